"""Mixtures: exact shares, every component in its own order, bad weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data import TokenBlocks
from spikelm.data.lanes import Lanes
from spikelm.data.mixture import LONGEST, Mixture, counts, layout
from spikelm.data.samples import IGNORE
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)


def blocks(letter: str, count: int, length: int = 4) -> TokenBlocks:
    """``count`` blocks, of one letter each in turn."""
    text = "".join(chr(ord(letter) + i % 26) * length for i in range(count))
    return TokenBlocks.from_documents([text + letter], BYTES, length, name=letter)


def mixture(weights: list[float]) -> Mixture:
    return Mixture({f"{c}{i}": blocks(c, 5 + 3 * i) for i, c in enumerate("aAa"[: len(weights)])}, weights)


# --- shares -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(WEIGHTS)
def test_shares_are_exact_over_a_period(weights: list[float]) -> None:
    found = counts({str(i): weight for i, weight in enumerate(weights)})
    share = np.array(weights) / sum(weights)
    assert np.abs(found / found.sum() - share).max() <= 1 / LONGEST
    assert found.sum() <= LONGEST + 1024
    order, before = layout(found, np.uint64(7))
    assert np.array_equal(np.bincount(order, minlength=len(found)), found)
    for number, count in enumerate(found):  # 0, 1, 2, ... of every component, in this order
        assert np.array_equal(before[order == number], np.arange(count))


@pytest.mark.parametrize(
    ("weights", "ratio"), [([0.7, 0.3], [7, 3]), ([1, 1, 1], [1, 1, 1]), ([2, 0, 6], [1, 0, 3]), ([5], [1])]
)
def test_round_shares_are_met_exactly(weights: list[float], ratio: list[int]) -> None:
    found = counts({str(i): weight for i, weight in enumerate(weights)})
    assert (found * sum(ratio) == np.array(ratio) * found.sum()).all()


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 2**40))
def test_every_batch_has_about_the_shares_of_the_whole(weights: list[float], seed: int) -> None:
    """Among the first n samples of a period, whatever n is: far closer than by chance."""
    found = counts({str(i): weight for i, weight in enumerate(weights)})
    order, _ = layout(found, np.uint64(seed))
    period = len(order)
    for number, count in enumerate(found):
        seen = np.concatenate([[0], np.cumsum(order == number)])
        assert np.abs(seen - np.arange(period + 1) * count / period).max() <= 1 + len(found) * count / period


# --- samples ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.05, 10.0), min_size=1, max_size=3), st.integers(0, 2**31 - 1), st.integers(0, 4000)
)
def test_component_and_index_are_functions_of_the_sample(weights: list[float], seed: int, first: int) -> None:
    mixed = mixture(weights)
    samples = np.arange(first, first + 300)
    source, index = mixed.locate(seed, samples)
    fresh = mixture(weights)
    for at in (299, 0, 123):  # alone, in another order, by another object
        one, other = fresh.locate(seed, samples[at : at + 1])
        assert (one[0], other[0]) == (source[at], index[at])
    # The samples of a component are numbered without gap, also from one period to the next.
    before, after = mixed.used(seed, first), mixed.used(seed, first + 300)
    for number in range(len(weights)):
        assert np.array_equal(index[source == number], np.arange(before[number], after[number]))
    assert after.sum() == first + 300


def test_each_component_has_its_own_order_and_epochs() -> None:
    mixed = mixture([1, 3])
    batch = mixed.batch(5, 0, 3 * 1024)
    source, index = mixed.locate(5, batch.samples.numpy())
    for number, letter in enumerate("aA"):
        part = blocks(letter, 5 + 3 * number)
        rows = batch.inputs[source == number]
        alone = part.gather(mixed.seed_of(5, number), index[source == number])
        assert (rows == alone.inputs).all()
        epochs = [tuple(rows[i : i + len(part), 0].tolist()) for i in range(0, 10 * len(part), len(part))]
        assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(epochs)) > 8
    share = (batch.inputs[:, 0] >= ord("a")).float().mean()
    assert share == 0.25
    assert mixed.epochs(5, 3 * 1024) == {"a": 3 * 256 / 5, "A": 3 * 768 / 8}


def test_equal_components_are_read_in_different_orders() -> None:
    parts = {name: blocks("a", 26) for name in "xy"}
    mixed = Mixture(parts, [1, 1])
    source, _ = mixed.locate(0, np.arange(52))
    rows = mixed.batch(0, 0, 52).inputs[:, 0].numpy()
    assert rows[source == 0].tolist() != rows[source == 1].tolist()


def test_periods_are_not_alike() -> None:
    mixed = mixture([0.6, 0.4])
    period = mixed.period
    orders = [
        tuple(mixed.locate(s, np.arange(r * period, (r + 1) * period))[0])
        for s, r in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(orders)) == 3


def test_totals_and_description() -> None:
    mixed = mixture([0.6, 0.4])
    assert mixed.num_tokens == (5 * 4 + 1) + (8 * 4 + 1) == mixed.num_bytes
    assert [part["share"] for part in mixed.describe()["parts"]] == [0.6, 0.4]
    assert [part["source"] for part in mixed.describe()["parts"]] == ["a", "A"]
    assert mixed.fingerprint() != mixture([0.5, 0.5]).fingerprint() == mixture([7.0, 7.0]).fingerprint()
    assert "0.6 a0" in repr(mixed)


def test_targets_between_documents_stay_hidden() -> None:
    parts = {
        name: TokenBlocks.from_documents([name * 3, name * 2] * 20, BYTES, 7, name=name) for name in "xy"
    }
    batch = Mixture(parts, [1, 2]).batch(0, 0, 40)
    hidden = batch.targets == IGNORE
    assert hidden.any() and (hidden[:, :-1] == batch.reset[:, 1:]).all()
    assert (batch.target_bytes == (~hidden).sum(dim=1)).all()


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "the mixture is empty"),
        ({"a": -1.0, "b": 2.0}, "the weight of a is -1.0; expected a finite number"),
        ({"a": 1.0, "b": math.nan}, "the weight of b is nan"),
        ({"a": math.inf}, "the weight of a is inf"),
        ({"a": "1"}, "the weight of a is '1'; expected a number"),
        ({"a": True}, "the weight of a is True"),
        ({"a": 0.0, "b": 0}, "all weights of the mixture are 0"),
        ({"a": 1.0, "b": 1e-9}, "the weight of b is a share of 1e-09, less than one in 65536"),
    ],
)
def test_bad_weights(weights: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        counts(weights)
    assert "\n" not in str(caught.value)


def test_bad_components() -> None:
    a, b = blocks("a", 5), blocks("A", 5, length=3)
    with pytest.raises(DataError, match=r"blocks of \[3, 4\] tokens"):
        Mixture({"a": a, "b": b}, [1, 1])
    with pytest.raises(DataError, match="2 sources got 1 weights"):
        Mixture({"a": a, "b": a}, [1])
    with pytest.raises(DataError, match="b carries its state"):
        Mixture({"a": a, "b": Lanes(a.store, BYTES, 4, 2)}, [1, 1])
    with pytest.raises(DataError, match="not that of this mixture"):
        mixture([1, 1]).restore({"parts": {"7": {}}})
