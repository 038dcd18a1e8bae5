"""The harness's questions, answered as its own HFLM answers them on the same checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import spikelm.hf  # noqa: F401 (the Auto classes know the model)
from spikelm.checkpoint import save_checkpoint
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation.tasks import offline
from spikelm.evaluation.tasks.language_model import HarnessModel, load
from spikelm.tokenizer import Tokenizer

from .conftest import sentence, small

MULTIPLE_CHOICE = ("arc_easy_local", "piqa_local", "winograd_wsc_local")


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)
    ]


def pairs(n: int = 6) -> list[tuple[str, str]]:
    rng = random.Random(3)
    found = []
    for _ in range(n):
        context = sentence(rng, rng.randint(2, 20))
        found += [(context, f" {sentence(rng, rng.randint(1, 5))}") for _ in range(3)]
    return found


@pytest.fixture(scope="module", params=["twin", "int8"])
def both(
    request: pytest.FixtureRequest, bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, HarnessModel, HFLM]:
    folder = tmp_path_factory.mktemp("both") / request.param
    save_checkpoint(folder, small(request.param, bpe.vocab_size), bpe)
    other = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return request.param, load(folder, batch_size=4), other


def test_loglikelihoods_are_those_of_hflm(both: tuple[str, HarnessModel, HFLM]) -> None:
    _, ours, other = both
    requests = asked("loglikelihood", *pairs(), ("", "the cat sat"))
    mine, theirs = ours.loglikelihood(requests), other.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    np.testing.assert_allclose([a for a, _ in mine], [a for a, _ in theirs], rtol=1e-6, atol=1e-4)
    assert ours.reader.tokens_read < ours.reader.tokens_asked


def test_integer_log_probabilities_have_the_bits_of_hflm(both: tuple[str, HarnessModel, HFLM]) -> None:
    """HFLM pads on the right and the model is causal: the bits are the same, only its sum is in float32."""
    kind, ours, other = both
    if kind != "int8":
        pytest.skip("the bits of float products depend on the batch")
    requests = asked("loglikelihood", *pairs())
    theirs = other.loglikelihood(requests, disable_tqdm=True)
    tokens = [ours._encode_pair(*request.args) for request in requests]
    scores = ours.reader.score([a + b for a, b in tokens], [len(a) for a, _ in tokens])
    assert {len(b) for _, b in tokens} > {1, 2}
    for score, (value, _) in zip(scores, theirs, strict=True):
        in_float32 = torch.from_numpy(score.logprobs).float()
        assert torch.equal(in_float32.double(), torch.from_numpy(score.logprobs))
        assert float(in_float32.sum()) == value


@pytest.mark.parametrize("task", [*MULTIPLE_CHOICE, "lambada_openai_local"])
def test_tasks_have_the_figures_of_hflm(
    both: tuple[str, HarnessModel, HFLM], task: str, offline_data: Path
) -> None:
    _, ours, other = both
    found = []
    for model in (ours, other):
        manager = TaskManager(include_defaults=False)
        result = simple_evaluate(
            model=model,
            tasks=[offline.config(task)],
            limit=20,
            bootstrap_iters=0,
            task_manager=manager,
            log_samples=True,
        )
        responses = [r[0] for s in result["samples"][task] for r in s["resps"]]
        figures = {k: v for k, v in result["results"][task].items() if k.startswith(("acc", "perplexity"))}
        found.append(({k: v for k, v in figures.items() if "stderr" not in k}, responses))
    (mine, own), (theirs, foreign) = found
    np.testing.assert_allclose([r[0] for r in own], [r[0] for r in foreign], rtol=1e-6, atol=1e-4)
    assert [r[1] for r in own] == [r[1] for r in foreign]
    assert mine == pytest.approx(theirs, rel=1e-5) and mine["acc,none"] == theirs["acc,none"]


def test_rolling_loglikelihoods_are_those_of_hflm(both: tuple[str, HarnessModel, HFLM]) -> None:
    _, ours, other = both
    texts = [sentence(random.Random(n), 5 + 20 * n) for n in range(5)]
    requests = asked("loglikelihood_rolling", *((text,) for text in texts))
    mine, theirs = ours.loglikelihood_rolling(requests), other.loglikelihood_rolling(requests, True)
    np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-4)


def test_a_long_document_is_read_whole(both: tuple[str, HarnessModel, HFLM], bpe: Tokenizer) -> None:
    _, ours, _ = both
    text = sentence(random.Random(9), 3000)
    tokens = [ours.prefix_token_id, *bpe.encode(text)]
    assert len(tokens) > 2049  # where HFLM would begin anew
    with torch.no_grad():
        logits, _ = ours.reader.model(torch.tensor([tokens[:-1]]), None)  # type: ignore[call-arg]
    rows = logits[0].log_softmax(-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    (mine,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert mine == pytest.approx(float(rows.double().sum()), rel=1e-6)


def test_written_texts_are_those_of_hflm(both: tuple[str, HarnessModel, HFLM]) -> None:
    _, ours, other = both
    contexts = ["the cat sat on a mat", "some dogs ran", "rain"]
    options = {"until": [" "], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", *((context, options) for context in contexts))
    mine = ours.generate_until(requests)
    # One at a time: HFLM pads on the left with a token that it then also reads where a model takes no mask.
    theirs = [other.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert mine == theirs and any(mine)


def test_a_text_without_context_begins_after_a_line_break(checkpoint: Path) -> None:
    ours = load(checkpoint)  # bytes: neither bos nor eos
    assert ours.prefix_token_id == ord("\n") == ours.eot_token_id
    for context in ("", "\n"):  # spaces at the end of a context belong to the continuation
        (found,) = ours.loglikelihood(asked("loglikelihood", (context, "cat")))
        (score,) = ours.reader.score([[10, *f"{context}cat".encode()]], [1])
        assert found == (float(score.logprobs.sum()), bool(score.greedy.all()))
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", ("",))) == [0.0]


def test_sampling_and_its_seed(checkpoint: Path) -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    requests = asked("generate_until", *[("the cat", options)] * 3)
    texts = [load(checkpoint, seed=seed).generate_until(requests) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"num_beams": 4}, "num_beams is 4; this sampler has 1 only"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_options_are_checked(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(checkpoint).generate_until(asked("generate_until", ("the cat", options)))


def test_what_cannot_be_asked_is_named(checkpoint: Path, bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="the continuation of 'the cat' is empty"):
        load(checkpoint).loglikelihood(asked("loglikelihood", ("the cat", "")))
    with pytest.raises(DataError, match="has 300 ids and the model only 256"):
        HarnessModel(small("twin"), bpe)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        load(checkpoint, batch_size=0)
