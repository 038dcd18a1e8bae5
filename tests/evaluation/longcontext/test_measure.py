"""Measured accuracies of models whose answers are known, and the command around it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli.evaluate_tasks import rerun_long_context, run_long_context
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, DataError, SpikeLMError
from spikelm.evaluation import record
from spikelm.evaluation.longcontext.measure import (
    DEPTHS,
    KINDS,
    measure_prompts,
    parse_kinds,
    parse_lengths,
    score,
)
from spikelm.evaluation.longcontext.needle import passkey
from spikelm.evaluation.longcontext.prompt import Haystack, Prompt
from spikelm.evaluation.longcontext.ruler import RULER
from spikelm.evaluation.tasks.reader import Reader
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

from .conftest import Remembering

BYTES = Tokenizer.bytes()
END = "\0"


def next_of(answer: str, written: str) -> str:
    return f" {answer}."[len(written) :] or END


def say_passkey(text: str) -> str:
    """Reads the key in the text; keys that end in an odd digit come out wrong."""
    before, _, written = text.partition("What is the pass key? The pass key is")
    found = re.search(r"The pass key is (\d{5})\.", before)
    if found is None:
        return END
    key = found.group(1)
    return next_of(key if int(key) % 2 == 0 else "00000", written)


def say_needle(text: str) -> str:
    """Finds only what lies in the first half of the text."""
    question = text.rfind(" The secret word of ")
    if question < 0:
        return END
    fact = re.search(r"The secret word of (\w+) is (\w+)\.", text[: question // 2])
    written = re.sub(r"^ The secret word of \w+ is", "", text[question:])
    return next_of(fact.group(2) if fact else "nothing", written)


def say_half(text: str) -> str:
    """Two of the four values of multivalue."""
    before, mark, written = text.partition("mentioned in the provided text are")
    if not mark:
        return END
    return next_of(" and ".join(re.findall(r"is: (\d{7})\.", before)[:2]), written)


def measured(say: Any, kind: str, haystack: Haystack, **options: Any) -> list[dict[str, Any]]:
    reader = Reader(Remembering(say), vocab_size=256, batch_size=3, chunk=512)
    given = {"samples": 8, "seed": 5, "haystack": haystack, **options}
    return measure_prompts(reader, BYTES, kind, 1200, **given)


def test_passkey_accuracy_is_that_of_the_model(haystack: Haystack) -> None:
    (row,) = measured(say_passkey, "passkey", haystack)
    keys = [passkey(random.Random(f"5/passkey/1200/{i}"), 1200, BYTES, haystack).answers[0] for i in range(8)]
    right = sum(int(key) % 2 == 0 for key in keys)
    assert 0 < right < 8
    share = right / 8
    assert row["accuracy"] == share and row["n"] == 8 and row["depth"] is None and row["length"] == 1200
    assert row["stderr"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    assert 1100 < row["tokens"] <= 1200


def test_the_needle_grid_shows_how_deep_a_model_remembers(haystack: Haystack) -> None:
    rows = measured(say_needle, "needle", haystack, samples=3)
    assert [row["depth"] for row in rows] == list(DEPTHS)
    assert [row["accuracy"] for row in rows][:2] == [1.0, 1.0]
    assert [row["accuracy"] for row in rows][3:] == [0.0, 0.0]
    assert all(row["n"] == 3 for row in rows)


def test_a_part_of_the_wanted_strings_counts_in_part(haystack: Haystack) -> None:
    (row,) = measured(say_half, "niah_multivalue", haystack, samples=4)
    assert row["accuracy"] == 0.5 and row["stderr"] == 0.0


def test_the_batch_changes_nothing(haystack: Haystack) -> None:
    rows = []
    for batch_size in (1, 5):
        reader = Reader(Remembering(say_passkey), vocab_size=256, batch_size=batch_size)
        rows.append(measure_prompts(reader, BYTES, "passkey", 600, samples=5, seed=1, haystack=haystack))
    assert rows[0] == rows[1]


def test_scores() -> None:
    prompt = Prompt(text="", tokens=[], answers=("ABCDE", "FGHIJ"))
    assert score("vt", prompt, "abcde and more") == 0.5
    assert score("vt", prompt, "FGHIJ, ABCDE") == 1.0 and score("vt", prompt, "") == 0.0
    one = Prompt(text="", tokens=[], answers=("12345",))
    assert score("passkey", one, " 12345. And") == 1.0
    assert score("passkey", one, " not 12345") == 0.0


def test_names_and_lengths() -> None:
    assert parse_kinds("needle, ruler,needle") == ("needle", *RULER)
    assert set(parse_kinds(",".join(KINDS))) == set(KINDS)
    assert parse_lengths("4k,512,1M") == (512, 4096, 1 << 20)
    for text in ("", "k", "0", "-4", "4.5", "many"):
        with pytest.raises(ConfigError, match="length"):
            parse_lengths(text)
    with pytest.raises(ConfigError, match="did you mean 'passkey'"):
        parse_kinds("paskey")
    with pytest.raises(ConfigError, match="no long-context task is named; known: passkey"):
        parse_kinds(" ,")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1)
    return save_checkpoint(tmp_path_factory.mktemp("c") / "model", SpikeLM(config), BYTES)


def test_tables_record_and_repetition(
    checkpoint: Path, prose: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "long.json"
    run_long_context(
        [checkpoint], "passkey,needle,mqar", "600,1k", samples=2, json_file=target, haystack=prose
    )
    shown = capsys.readouterr().out
    for text in ("passkey", "needle", "mqar", "1,024", "75%", "±"):
        assert text in shown
    saved = record.read(target)
    assert saved["kind"] == "long-context" and saved["seed"] == 0 and saved["n"] == 2
    rows = saved["results"]["models"]["model"]
    assert set(rows) == {"passkey", "needle", "mqar"}
    assert [row["length"] for row in rows["mqar"]] == [600, 1024]
    assert len(rows["needle"]) == 2 * len(DEPTHS)
    assert all(
        {"length", "depth", "accuracy", "stderr", "n"} <= set(row) for own in rows.values() for row in own
    )
    assert len(saved["data"]["sha256"]) == 64 and saved["tokenizer_sha256"] == BYTES.sha256
    assert rerun_long_context(saved["arguments"])["results"] == saved["results"]
    assert capsys.readouterr().out == ""


def test_associative_recall_needs_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    bare = save_checkpoint(tmp_path / "bare", SpikeLM(config))
    found = run_long_context([bare], "mqar", "64", samples=3, json_file=Path("-"))
    assert json.loads(capsys.readouterr().out)["results"] == found["results"]
    assert found["tokenizer_sha256"] is None and found["data"]["sha256"] is None
    with pytest.raises(DataError, match="no usable tokenizer"):
        run_long_context([bare], "passkey", "600", samples=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kinds": "pasky"}, "did you mean 'passkey'"),
        ({"lengths": "long"}, "length 'long'"),
        ({"lengths": "40"}, "40 tokens are too few"),
        ({"samples": 0}, "samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"haystack": "/nowhere/at/all.txt", "kinds": "needle"}, "/nowhere/at/all.txt"),
        ({"dtype": "int4"}, "dtype 'int4'"),
    ],
)
def test_bad_input(checkpoint: Path, words: dict[str, Any], message: str) -> None:
    given = {"checkpoints": [checkpoint], "kinds": "passkey", "lengths": "600", "samples": 1, **words}
    with pytest.raises(SpikeLMError, match=message) as caught:
        run_long_context(**given)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_memory_does_not_grow_with_the_length(checkpoint: Path, haystack: Haystack) -> None:
    """The model sees one chunk at a time, whatever the length; its state has one size."""
    from spikelm.checkpoint import load_model
    from spikelm.state import state_bytes

    model = load_model(checkpoint)
    seen: list[tuple[int, int]] = []
    inner = model.features

    def noted(tokens: Any, state: Any, ctx: Any) -> Any:
        h, new = inner(tokens, state, ctx)
        seen.append((tokens.numel(), state_bytes(new) // len(tokens)))
        return h, new

    model.features = noted  # type: ignore[method-assign]
    reader = Reader(model, vocab_size=256, batch_size=2, chunk=128)
    sizes = []
    for length in (700, 7000):
        seen.clear()
        measure_prompts(
            reader,
            BYTES,
            "passkey",
            length,
            samples=2,
            seed=0,
            haystack=haystack,
        )
        sizes.append((max(n for n, _ in seen), {size for _, size in seen}))
    assert sizes[0][0] <= 2 * 128 and sizes[1][0] <= 2 * 128 and sizes[0][1] == sizes[1][1]
