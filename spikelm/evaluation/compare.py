"""Is one model better than another on the same text? Paired bootstrap over units that all models share.

A unit is a document, or, where there are few documents, a block of ``BLOCK_BYTES`` bytes of one. Units are
cut by bytes, so models with different tokenizers have the same ones. A resample draws units with replacement,
the same ones for every model; each model's bits per byte are its nats over its bytes in what was drawn. The
interval is that of the percentiles of the difference (Efron and Tibshirani 1993, chapters 8 and 13).
Losses of neighbouring blocks are not quite independent, so that intervals over blocks are a little narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikelm.errors import DataError
from spikelm.evaluation.figures import MIN_DOCUMENTS
from spikelm.evaluation.scoring import Scores

BLOCK_BYTES = 1024
"""Bytes of a block, the unit where there are few documents."""
MIN_UNITS = 10
"""With fewer units there is no interval: percentiles of so few say little."""
RESAMPLES = 4000
LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Units:
    """What one model needed per unit.

    Args:
        nats: [n], sum of -log p of the scored tokens that begin in the unit.
        bytes: [n], bytes those tokens stand for; 0 where none begins.
        tokens: [n], how many they are.
        over: what a unit is, for people.
    """

    nats: Floats
    bytes: Floats
    tokens: Floats
    over: str


class UnitTally:
    """Adds up scores of a corpus per document and block of bytes.

    Args:
        byte_lengths: per document, float64 [N]: bytes each token stands for (0 for a start token).
    """

    def __init__(self, byte_lengths: Sequence[Floats]) -> None:
        self._lengths = byte_lengths
        sizes = [round(float(lengths.sum())) for lengths in byte_lengths]
        # From the text alone, so that models with different tokenizers get the same units.
        self._by_document = sum(size > 1 for size in sizes) >= MIN_DOCUMENTS
        blocks = [max(1, math.ceil(size / BLOCK_BYTES)) for size in sizes]
        self._offset = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
        self._document = np.repeat(np.arange(len(blocks)), blocks)
        self._sums = np.zeros((3, int(self._offset[-1])))
        self._starts: dict[int, Floats] = {}

    def add(self, scores: Scores) -> None:
        """Count scored targets of one document."""
        here = slice(scores.first, scores.first + len(scores.nats))
        first = int(self._offset[scores.document])
        last = int(self._offset[scores.document + 1]) - 1
        starts = self._begins(scores.document)[here]
        block = np.minimum(first + (starts // BLOCK_BYTES).astype(np.int64), last)
        np.add.at(self._sums[0], block, scores.nats)
        np.add.at(self._sums[1], block, self._lengths[scores.document][here])
        np.add.at(self._sums[2], block, 1.0)

    def units(self) -> Units:
        """Per document from :data:`MIN_DOCUMENTS` documents of two bytes or more on, per block below that."""
        if self._by_document:
            nats, size, tokens = (np.bincount(self._document, row).astype(np.float64) for row in self._sums)
            return Units(nats=nats, bytes=size, tokens=tokens, over="documents")
        nats, size, tokens = self._sums
        return Units(nats=nats, bytes=size, tokens=tokens, over=f"blocks of {BLOCK_BYTES} bytes")

    def documents(self) -> list[dict[str, Any]]:
        """Figures of every document: tokens, bytes, bits_per_byte (None where nothing is scored)."""
        nats, size, tokens = (np.bincount(self._document, row) for row in self._sums)
        return [
            {
                "tokens": int(n),
                "bytes": round(float(b)),
                "bits_per_byte": float(s / b / math.log(2)) if b > 0 else None,
            }
            for s, b, n in zip(nats, size, tokens, strict=True)
        ]

    def _begins(self, document: int) -> Floats:
        """Where each token of a document begins, in bytes; kept for the few documents read at once."""
        if document not in self._starts:
            if len(self._starts) >= 64:
                self._starts.clear()
            lengths = self._lengths[document]
            self._starts[document] = np.cumsum(lengths) - lengths
        return self._starts[document]


def compare(models: Mapping[str, Mapping[str, Units]], *, seed: int) -> list[dict[str, Any]]:
    """The difference of every model to the first, in every figure that both have.

    Args:
        models: label of the model -> label of the figure -> its units; the first is the one compared with.
        seed: of the resampling.

    Returns:
        Per model and figure {a, b, figure, difference_bits_per_byte (b minus a: positive where b needs more
        bits), low, high, level, n, units, resamples}; low and high are None below :data:`MIN_UNITS`.

    Raises:
        DataError: the models were measured on different units.
    """
    first, *others = models
    found = []
    for figure, base in models[first].items():
        pairs = [(label, models[label][figure]) for label in others if figure in models[label]]
        for label, units in pairs:
            if len(units.nats) != len(base.nats) or units.over != base.over:
                raise DataError(
                    f"{first} was measured on {len(base.nats)} {base.over} and {label} on {len(units.nats)} "
                    f"{units.over}; give both the same text"
                )
        if not pairs:
            continue
        nats = np.stack([base.nats, *(units.nats for _, units in pairs)])
        size = np.stack([base.bytes, *(units.bytes for _, units in pairs)])
        # A unit in which no model scores a byte (an empty document) is none.
        used = (size > 0).any(0)
        nats, size = nats[:, used], size[:, used]
        whole = nats.sum(1) / size.sum(1) / math.log(2)
        n = int(used.sum())
        drawn = _resampled(nats, size, seed) if n >= MIN_UNITS else None
        tail = (1 - LEVEL) / 2
        for index, (label, units) in enumerate(pairs, start=1):
            low = high = None
            if drawn is not None:
                ends = np.quantile(drawn[:, index] - drawn[:, 0], [tail, 1 - tail])
                low, high = float(ends[0]), float(ends[1])
            found.append(
                {
                    "a": first,
                    "b": label,
                    "figure": figure,
                    "difference_bits_per_byte": float(whole[index] - whole[0]),
                    "low": low,
                    "high": high,
                    "level": LEVEL,
                    "n": n,
                    "units": units.over,
                    "resamples": RESAMPLES,
                }
            )
    return found


def _resampled(nats: Floats, size: Floats, seed: int) -> Floats:
    """Bits per byte of each model [M, n] in each resample, [resamples, M]."""
    rng = np.random.default_rng(seed)
    n = nats.shape[1]
    ratios = np.empty((RESAMPLES, nats.shape[0]))
    for row in range(RESAMPLES):
        times = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        total = size @ times
        # Of few units a draw may hold none of a model's bytes: that draw says nothing about it.
        ratios[row] = np.divide(nats @ times, total, out=np.full_like(total, np.nan), where=total > 0)
    kept: Floats = ratios[~np.isnan(ratios).any(1)] / math.log(2)
    return kept
