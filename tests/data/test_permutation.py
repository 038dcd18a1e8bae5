"""The order of samples: a permutation each epoch, different each time, without a pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data.permutation import key, permute
from spikelm.errors import DataError


def order(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), n, key(seed, np.full(n, epoch)))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.sort(order(n, seed, epoch)).tolist() == list(range(n))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2**50), st.integers(0, 2**40))
def test_any_element_is_found_alone(n: int, seed: int) -> None:
    index = np.unique(np.random.default_rng(seed).integers(0, n, 50))
    together = permute(index, n, key(seed, np.zeros_like(index)))
    alone = [permute(i[None], n, key(seed, np.zeros(1, np.int64)))[0] for i in index]
    assert together.tolist() == alone
    assert (together >= 0).all() and (together < n).all() and len(set(alone)) == len(index)


def test_epochs_and_seeds_differ() -> None:
    orders = [order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10


def test_looks_random() -> None:
    n, epochs = 16, 4000
    keys = key(7, np.repeat(np.arange(epochs), n))
    places = permute(np.tile(np.arange(n), epochs), n, keys).reshape(epochs, n)
    counts = np.stack([np.bincount(places[:, i], minlength=n) for i in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < 320  # 225 degrees of freedom: mean 225, standard deviation 21
    big = order(100_000)
    assert abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(len(big)), big)[0, 1]) < 0.02


def test_nothing_cannot_be_ordered() -> None:
    with pytest.raises(DataError, match="at least 1"):
        permute(np.arange(0), 0, key(0, np.arange(0)))
