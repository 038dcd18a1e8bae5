"""Associative recall: the sequences of the paper, and accuracies that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spikelm.errors import DataError
from spikelm.evaluation.longcontext.measure import measure_recall
from spikelm.evaluation.longcontext.mqar import pairs_for, recall
from spikelm.evaluation.tasks.reader import Reader
from spikelm.recurrence import Context
from spikelm.state import State

V = 64


@pytest.mark.parametrize(("length", "pairs"), [(64, None), (64, 16), (256, None), (9, None)])
def test_sequences(length: int, pairs: int | None) -> None:
    for seed in range(20):
        one = recall(np.random.default_rng(seed), length, V, pairs)
        count = pairs_for(length, V) if pairs is None else pairs
        keys, values = one.tokens[: 2 * count : 2], one.tokens[1 : 2 * count : 2]
        assert len(one.tokens) == length and len(one.places) == count
        assert keys.min() >= 1 and keys.max() < V // 2 <= values.min() and values.max() < V
        assert len(set(keys)) == len(set(values)) == count
        assert (np.diff(one.places) > 0).all() and one.places.min() >= 2 * count
        table = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert [table[key] for key in one.tokens[one.places].tolist()] == one.values.tolist()
        rest = np.delete(one.tokens, [*range(2 * count), *one.places])
        assert (rest == 0).all()
        assert (np.delete(np.arange(length), one.places)[2 * count :] > 0).all()


def test_queries_come_early_more_often_than_late() -> None:
    """The power law of the paper: most queries follow soon, some very late."""
    places = np.concatenate([recall(np.random.default_rng(s), 256, 512, 4).places for s in range(300)]) - 8
    assert np.median(places) < 60 < 200 < places.max()


def test_room() -> None:
    assert pairs_for(64, 1000) == 8 and pairs_for(10_000, 1000) == 128 and pairs_for(10_000, 20) == 9
    with pytest.raises(DataError, match="no room for a pair"):
        pairs_for(7, 1000)
    with pytest.raises(DataError, match="16 pairs with length 63"):
        recall(np.random.default_rng(0), 63, V, 16)


class Table:
    """Says what followed a token when it first came; odd keys are forgotten where ``forgetful``."""

    def __init__(self, forgetful: bool) -> None:
        self.forgetful = forgetful

    def init_state(
        self, batch: int, device: object = None, dtype: object = None, max_len: object = None
    ) -> State:
        return {"next": torch.full((batch, V), -1), "last": torch.full((batch,), -1)}

    def __call__(self, tokens: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        table, last = state["next"].clone(), state["last"].clone()
        logits = torch.zeros(*tokens.shape, V)
        for row, own in enumerate(tokens.tolist()):
            for column, token in enumerate(own):
                if ctx.valid is not None and not ctx.valid[row, column]:
                    continue
                before = int(last[row])
                if before >= 0 and table[row, before] < 0:
                    table[row, before] = token
                if table[row, token] >= 0 and not (self.forgetful and token % 2):
                    logits[row, column, table[row, token]] = 5.0
                last[row] = token
        return logits, {"next": table, "last": last}


def test_accuracy_is_that_of_what_is_remembered() -> None:
    rows = {}
    for forgetful in (False, True):
        reader = Reader(Table(forgetful), vocab_size=V, batch_size=3, chunk=10)
        rows[forgetful] = measure_recall(reader, 64, samples=7, seed=3)
    assert rows[False] == {
        "length": 64,
        "depth": None,
        "accuracy": 1.0,
        "stderr": 0.0,
        "n": 7,
        "pairs": 8,
    }
    drawn = [recall(np.random.default_rng([3, 64, i]), 64, V) for i in range(7)]
    even = [float((one.tokens[one.places] % 2 == 0).mean()) for one in drawn]
    assert rows[True]["accuracy"] == pytest.approx(np.mean(even)) and 0.2 < np.mean(even) < 0.8
    assert rows[True]["stderr"] == pytest.approx(np.std(even, ddof=1) / 7**0.5)
