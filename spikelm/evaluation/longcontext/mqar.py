"""Multi-query associative recall (MQAR; Arora et al., "Zoology", arXiv:2312.04927), on token ids.

A sequence begins with D pairs of a key and its value, all different; then every key comes once more, at
distances drawn from a power law (density ~ distance^(power - 1), power 0.01), and the model should say its
value. Keys are from the lower half of the vocabulary (without 0), values from the upper half; token 0 fills
the rest. It needs no tokenizer: it is made for models that were trained on such sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikelm.errors import DataError

POWER = 0.01
"""Exponent of the power law, that of the paper's experiments."""
MOST_PAIRS = 128
"""Pairs where the length would have room for more."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """One sequence.

    Args:
        tokens: int64 [T].
        places: int64 [D], where keys come again, ascending.
        values: int64 [D], what should follow at each.
    """

    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    values: NDArray[np.int64]


def pairs_for(length: int, vocab_size: int) -> int:
    """Pairs of a sequence: an eighth of its length, as far as the vocabulary has keys and values.

    Raises:
        DataError: the length or the vocabulary has no room for one.
    """
    found = min(length // 8, MOST_PAIRS, vocab_size // 2 - 1)
    if found < 1:
        raise DataError(
            f"associative recall with length {length} and {vocab_size} tokens has no room for a pair; "
            "expected a length of at least 8 and at least 4 tokens"
        )
    return found


def recall(rng: np.random.Generator, length: int, vocab_size: int, pairs: int | None = None) -> Recall:
    """Draw a sequence.

    Args:
        rng: source of randomness.
        length: T.
        vocab_size: of the model.
        pairs: D; :func:`pairs_for` unless given. 4 D <= T and D < V / 2.

    Raises:
        DataError: there is no room for so many pairs.
    """
    pairs = pairs_for(length, vocab_size) if pairs is None else pairs
    half = vocab_size // 2
    if pairs < 1 or 4 * pairs > length or pairs >= half:
        raise DataError(
            f"{pairs} pairs with length {length} and {vocab_size} tokens; expected at least one pair, a "
            "length of four times as many, and as many different keys"
        )
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(vocab_size - half, pairs, replace=False)
    tokens = np.zeros(length, dtype=np.int64)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    # A query takes two columns (the key, and what the answer is read from), so slots are two tokens wide.
    slots = (length - 2 * pairs) // 2
    weight = POWER * np.arange(1, slots + 1, dtype=np.float64) ** (POWER - 1)
    places = 2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=weight / weight.sum())
    tokens[places] = keys
    order = np.argsort(places)
    return Recall(tokens=tokens, places=places[order], values=values[order])
