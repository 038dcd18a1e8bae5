"""Offline tasks: which there are, where they read, what they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spikelm.errors import ConfigError, DataError
from spikelm.evaluation.tasks import offline
from spikelm.evaluation.tasks.language_model import HarnessModel, load
from spikelm.evaluation.tasks.run import parse, run
from spikelm.tokenizer import Tokenizer

from .conftest import small

NAMES = [
    "arc_challenge_local",
    "arc_easy_local",
    "copa_local",
    "lambada_openai_local",
    "lambada_test_local",
    "openbookqa_local",
    "piqa_local",
    "winograd_wsc_local",
]


def test_names() -> None:
    assert offline.names() == NAMES
    assert parse("piqa_local, arc_easy_local@5") == {"piqa_local": -1, "arc_easy_local@5": 5}
    assert list(parse("local")) == NAMES
    assert parse("local@2")["copa_local@2"] == 2
    assert parse("copa_local,copa_local@1") == {"copa_local": -1, "copa_local@1": 1}
    for text, message in (
        ("", "no task is named; offline ones are arc_challenge_local"),
        ("piqa_local@many", "NAME@K with a number K"),
        ("copa_local,local", "named twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(text)


def test_all_of_them_with_and_without_sharing(checkpoint: Path, offline_data: Path) -> None:
    results = {}
    read = {}
    for share in (True, False):
        model = load(checkpoint, share=share)
        results[share] = run(model, parse("local"), limit=20)
        read[share] = model.reader.tokens_read
    assert results[True] == results[False] and read[True] < 0.6 * read[False]
    found = results[True]
    assert list(found) == NAMES
    assert all(row["n"] == 20 and 0 <= row["acc"] <= 1 and row["acc_stderr"] >= 0 for row in found.values())
    assert {"acc_norm", "acc_norm_stderr"} <= set(found["piqa_local"])
    # Two files, one set of questions.
    assert found["lambada_openai_local"] == found["lambada_test_local"]
    assert found["lambada_openai_local"]["perplexity"] > 1


def test_examples_are_the_first_documents_and_no_question(checkpoint: Path, offline_data: Path) -> None:
    model, seen = load(checkpoint), []
    score = model.reader.score

    def noted(sequences: Any, first: Any) -> Any:
        seen.extend(sequences)
        return score(sequences, first)

    model.reader.score = noted  # type: ignore[method-assign]
    found = run(model, parse("copa_local@3"), limit=None)
    assert found["copa_local@3"]["n"] == 24 - 3
    texts = [bytes(tokens).decode() for tokens in seen]
    shots = {text.rpartition("\n\n")[0] for text in texts}
    assert len(texts) == 2 * 21 and len(shots) == 1 and shots.pop().count(", therefore ") == 3
    questions = {text.rpartition("\n\n")[2].partition(", therefore")[0] for text in texts}
    assert len(questions) == 21
    assert model.reader.tokens_read < model.reader.tokens_asked / 5


def test_a_model_that_knows_is_told_from_one_that_does_not(offline_data: Path) -> None:
    """Questions are put to the model in full, and the right choice is the one that counts as right."""
    tokenizer = Tokenizer.bytes()

    class Knowing(HarnessModel):
        """Gives the gold answer of its table the highest score."""

        def __init__(self, right: bool) -> None:
            super().__init__(small("twin"), tokenizer)
            self.right = right

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            answers = []
            for request in requests:
                document, choice = request.doc, request.args[1].strip()
                if "choices" in document:
                    gold = choice == document["choices"][document["gold"]]
                elif "context_options" in document:
                    gold = request.args[0] == document["context_options"][document["gold"]]
                else:
                    whole = document.get("text") or f"{document['context']} {document['continuation']}"
                    gold = request.args[0] + request.args[1] == whole
                answers.append((0.0 if gold == self.right else -50.0, gold == self.right))
            return answers

    for right, expected in ((True, 1.0), (False, 0.0)):
        found = run(Knowing(right), parse("local"), limit=20)
        assert {name: row["acc"] for name, row in found.items()} == dict.fromkeys(NAMES, expected)


def test_prompts_are_worded_as_the_harness_words_them(offline_data: Path, checkpoint: Path) -> None:
    model, seen = load(checkpoint), []
    score = model.reader.score

    def noted(sequences: Any, first: Any) -> Any:
        seen.extend(
            (bytes(t[:at]).decode(), bytes(t[at:]).decode()) for t, at in zip(sequences, first, strict=True)
        )
        return score(sequences, first)

    model.reader.score = noted  # type: ignore[method-assign]
    for task in ("arc_easy_local", "piqa_local"):
        seen.clear()
        run(model, parse(task), limit=1)
        context, choice = seen[0]
        assert context.startswith("Question: ") and context.endswith("?\nAnswer:")
        assert choice.startswith(" ") and not choice.startswith("  ")


def test_real_files_are_read(data_dir: Path, checkpoint: Path) -> None:
    if not (data_dir / "eval").is_dir():
        pytest.skip("the data folder has no eval/")
    found = run(load(checkpoint, batch_size=16), parse("copa_local,winograd_wsc_local"), limit=20)
    assert all(row["n"] == 20 for row in found.values())


def test_where_the_documents_should_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPIKELM_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"piqa_local reads eval/piqa.jsonl .* but SPIKELM_DATA is not set"):
        offline.config("piqa_local")
    monkeypatch.setenv("SPIKELM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"needs .*piqa.jsonl \(or piqa.jsonl.xz\), which is not there"):
        offline.config("piqa_local")
    with pytest.raises(ConfigError, match="did you mean 'piqa_local'"):
        offline.config("piqa_locl")


def test_limit(checkpoint: Path, offline_data: Path) -> None:
    with pytest.raises(ConfigError, match="limit is 0"):
        run(load(checkpoint), parse("copa_local"), limit=0)
