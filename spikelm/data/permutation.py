"""A random order of n things that needs no list of them.

A Feistel network permutes the numbers of an even number of bits, whatever its round function; numbers that
land outside 0..n-1 are sent through again until they land inside ("cycle walking"; Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002), which permutes 0..n-1. The domain is less than 4 n, so few
passes are needed. Memory is constant, and any element is found without the others.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spikelm.errors import DataError

_ROUNDS = 8
_MASK = (1 << 64) - 1


def permute(index: npt.NDArray[np.int64], n: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Position of every ``index`` in a random order of 0..n-1.

    Args:
        index: int64 [M], each in 0..n-1.
        n: how many things there are, at least 1.
        keys: uint64 [M], which order each index is looked up in (see :func:`key`).

    Returns:
        int64 [M]; for one key, distinct indices give distinct positions.
    """
    if n < 1:
        raise DataError(f"cannot order {n} things; expected at least 1")
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half, keys[outside])
        outside = value >= np.uint64(n)
    return value.astype(np.int64)


def key(seed: int, epoch: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Keys [M] of the orders that belong to ``seed`` and each ``epoch`` [M]."""
    base = np.full(epoch.shape, seed & _MASK, dtype=np.uint64)
    return _mix(_mix(base) ^ epoch.astype(np.uint64))


def _feistel(
    value: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << int(half)) - 1)
    left, right = value >> half, value & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(turn))) & mask)
    return (left << half) | right


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalising hash of SplitMix64 (Steele, Lea and Flood, 2014); array arithmetic wraps around."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
