"""Scores with shared prefixes are those without: the same bits on the integer path."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from spikelm.errors import DataError
from spikelm.evaluation.tasks.reader import Reader, Scored
from spikelm.model import SpikeLM

from .conftest import small


def questions(n: int = 6, examples: int = 40, vocabulary: int = 256) -> tuple[list[list[int]], list[int]]:
    """Few-shot multiple choice: sequences, and where each choice begins."""
    rng = random.Random(0)

    def some(k: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(k)]

    shots = some(examples)
    sequences, first = [], []
    for _ in range(n):
        question = some(rng.randint(18, 30))
        for _ in range(4):
            sequences.append(shots + question + some(rng.randint(1, 6)))
            first.append(len(shots) + len(question))
    return sequences, first


def totals(scores: list[Scored]) -> list[float]:
    return [float(score.logprobs.sum()) for score in scores]


@torch.no_grad()
def directly(model: SpikeLM, sequences: list[list[int]], first: list[int]) -> list[tuple[float, bool]]:
    """One sequence after the other, whole."""
    found = []
    for tokens, at in zip(sequences, first, strict=True):
        logits, _ = model(torch.tensor([tokens[:-1]]))
        rows, targets = logits[0, at - 1 :].log_softmax(-1), torch.tensor(tokens[at:])
        values = rows[torch.arange(len(targets)), targets].double().numpy()
        found.append((float(values.sum()), bool((rows.argmax(-1) == targets).all())))
    return found


@pytest.mark.parametrize("kind", ["twin", "float", "int8"])
def test_shared_prefixes_change_no_score_and_save_most_tokens(kind: str) -> None:
    model = small(kind)
    sequences, first = questions()
    expected = directly(model, sequences, first)
    asked = sum(len(tokens) - 1 for tokens in sequences)
    exact = kind == "int8"
    found = {}
    for share in (False, True):
        reader = Reader(model, vocab_size=256, batch_size=5, chunk=16, share=share)
        scores = reader.score(sequences, first)
        found[share] = totals(scores)
        values = [value for value, _ in expected]
        if exact:
            assert found[share] == values
        else:
            np.testing.assert_allclose(found[share], values, rtol=1e-6, atol=1e-5)
        assert [bool(score.greedy.all()) for score in scores] == [greedy for _, greedy in expected]
        assert reader.tokens_asked == asked
        if not share:
            assert reader.tokens_read == asked
        else:
            contexts = {tuple(tokens[:at]) for tokens, at in zip(sequences, first, strict=True)}
            rest = sum(len(tokens) - 1 - at for tokens, at in zip(sequences, first, strict=True))
            # The examples once, each question once, and what the model must read of every choice.
            assert reader.tokens_read == 40 + sum(len(c) - 40 for c in contexts) + rest
            assert reader.tokens_read < asked / 4
    if exact:
        assert found[True] == found[False]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_integer_scores_have_the_same_bits_however_the_work_is_cut(batch_size: int, chunk: int) -> None:
    model = small("int8")
    sequences, first = questions(n=3, examples=17)
    expected = [value for value, _ in directly(model, sequences, first)]
    reader = Reader(model, vocab_size=256, batch_size=batch_size, chunk=chunk)
    assert totals(reader.score(sequences, first)) == expected


SWIGLU = {"name": "swiglu"}
LAYERS: dict[str, dict[str, Any]] = {
    "growing memory": {"layers": [{"mixer": {"name": "attention", "num_heads": 2}, "channel": SWIGLU}]},
    "window": {"layers": [{"mixer": {"name": "swa", "num_heads": 2, "window": 8}, "channel": SWIGLU}]},
    "matrix state": {"layers": [{"mixer": {"name": "gla", "num_heads": 2}, "channel": {"name": "rwkv"}}]},
    "sinks": {"sink_tokens": 3},
    "a head with memory": {"head_neuron": {"name": "lif"}},
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_memory_is_forked(name: str) -> None:
    model = small("float", **LAYERS[name]).double()
    sequences, first = questions(n=2, examples=20)
    expected = [value for value, _ in directly(model, sequences, first)]
    for share in (False, True):
        reader = Reader(model, vocab_size=256, batch_size=3, chunk=10, share=share)
        np.testing.assert_allclose(totals(reader.score(sequences, first)), expected, rtol=1e-9)


def test_the_likeliest_token_after_any_place() -> None:
    model = small("int8")
    sequences, _ = questions(n=2, examples=30)
    places = [[0, 5, 29, 30, len(tokens) - 1] for tokens in sequences]
    found = Reader(model, vocab_size=256, batch_size=3, chunk=11).likeliest(sequences, places)
    for tokens, own, said in zip(sequences, places, found, strict=True):
        with torch.no_grad():
            logits, _ = model(torch.tensor([tokens]))
        assert said.tolist() == logits[0, own].argmax(-1).tolist()


def test_bad_input_is_named() -> None:
    reader = Reader(small("twin"), vocab_size=256)
    with pytest.raises(DataError, match="number 0 of 3; expected a token with another before it"):
        reader.score([[1, 2, 3]], [0])
    with pytest.raises(DataError, match="number 3 of 3"):
        reader.score([[1, 2, 3]], [3])
    with pytest.raises(DataError, match="has token 256, but the model has 256 tokens"):
        reader.score([[1, 256, 3]], [1])
    with pytest.raises(DataError, match="a sequence has no token"):
        list(reader.ends([[1], []]))
    assert reader.score([], []) == []


def test_logits_that_are_not_finite_are_refused() -> None:
    model = small("twin")
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="log-likelihood of sequence 0 is not finite"):
        Reader(model, vocab_size=256).score([[1, 2, 3]], [1])
    with pytest.raises(DataError, match="logits are not finite"):
        Reader(model, vocab_size=256).likeliest([[1, 2, 3]], [[1]])
