"""From scored tokens to figures: bits per byte, nats, perplexities, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikelm.errors import DataError
from spikelm.evaluation.scoring import Scores

BLOCK = 512
"""Tokens of a block, the unit of the standard error where there are few documents."""

MIN_DOCUMENTS = 30
"""From this many documents on, the standard error is taken over documents."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One labelled result. Figures with different labels are never averaged or compared silently.

    Args:
        label: ``disjoint@L``, ``strided@L/S`` or ``carried``.
        tokens: scored tokens.
        bytes: UTF-8 bytes those tokens stand for.
        documents: documents with at least one scored token.
        nats: sum of -log p over the scored tokens.
        bits_per_byte: nats / (bytes ln 2).
        nats_per_token: nats / tokens.
        nats_per_byte: nats / bytes.
        perplexity_per_token: exp(nats per token).
        perplexity_per_byte: exp(nats per byte).
        stderr_bits_per_byte: standard error of bits_per_byte, None with a single unit.
        stderr_nats_per_token: standard error of nats_per_token, None with a single unit.
        stderr_over: what the standard error is over, with the number of units.
        stderr_n: that number.
        by_context: nats per token by the number of tokens seen before, in bins of powers of two.
    """

    label: str
    tokens: int
    bytes: int
    documents: int
    nats: float
    bits_per_byte: float
    nats_per_token: float
    nats_per_byte: float
    perplexity_per_token: float
    perplexity_per_byte: float
    stderr_bits_per_byte: float | None
    stderr_nats_per_token: float | None
    stderr_over: str
    stderr_n: int
    by_context: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Tally:
    """Adds up scores of a corpus, per block of every document.

    Args:
        byte_lengths: per document, float64 [N]: bytes each token stands for (0 for a start token).
    """

    def __init__(self, byte_lengths: Sequence[Floats]) -> None:
        self._lengths = byte_lengths
        blocks = [max(1, math.ceil(len(lengths) / BLOCK)) for lengths in byte_lengths]
        self._offset = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
        self._document = np.repeat(np.arange(len(blocks)), blocks)
        total = int(self._offset[-1])
        self._nats, self._bytes, self._tokens = np.zeros(total), np.zeros(total), np.zeros(total)
        self._by_context = np.zeros((2, 64))

    def add(self, scores: Scores) -> None:
        """Count scored targets of one document."""
        count = len(scores.nats)
        positions = np.arange(scores.first, scores.first + count)
        block = self._offset[scores.document] + positions // BLOCK
        np.add.at(self._nats, block, scores.nats)
        np.add.at(self._bytes, block, self._lengths[scores.document][positions])
        np.add.at(self._tokens, block, 1.0)
        # frexp(c) = (m, e) with 2^(e-1) <= c < 2^e: the bin of a context of c tokens is e - 1.
        bins = np.frexp(np.arange(scores.context, scores.context + count).astype(np.float64))[1] - 1
        np.add.at(self._by_context[0], bins, scores.nats)
        np.add.at(self._by_context[1], bins, 1.0)

    def figure(self, label: str) -> Figure:
        """The figures of everything added.

        Raises:
            DataError: if nothing was scored.
        """
        nats, size, tokens = float(self._nats.sum()), float(self._bytes.sum()), float(self._tokens.sum())
        if tokens == 0 or size == 0:
            raise DataError("there is nothing to score; expected at least one document of two tokens")
        documents = int((np.bincount(self._document, self._tokens) > 0).sum())
        units, over = self._units(documents)
        error_bytes = ratio_stderr(units[0], units[1])
        return Figure(
            label=label,
            tokens=round(tokens),
            bytes=round(size),
            documents=documents,
            nats=nats,
            bits_per_byte=nats / size / math.log(2),
            nats_per_token=nats / tokens,
            nats_per_byte=nats / size,
            perplexity_per_token=math.exp(min(nats / tokens, 700.0)),
            perplexity_per_byte=math.exp(min(nats / size, 700.0)),
            stderr_bits_per_byte=None if error_bytes is None else error_bytes / math.log(2),
            stderr_nats_per_token=ratio_stderr(units[0], units[2]),
            stderr_over=over,
            stderr_n=len(units[0]),
            by_context=[
                {"from": 2**e, "to": 2 ** (e + 1) - 1, "tokens": int(n), "nats_per_token": float(s / n)}
                for e, (s, n) in enumerate(self._by_context.T)
                if n > 0
            ],
        )

    def _units(self, documents: int) -> tuple[tuple[Floats, Floats, Floats], str]:
        sums = (self._nats, self._bytes, self._tokens)
        if documents >= MIN_DOCUMENTS:
            nats, size, tokens = (np.bincount(self._document, values).astype(np.float64) for values in sums)
            name = f"{documents} documents"
        else:
            nats, size, tokens = sums
            name = f"{int((tokens > 0).sum())} blocks of at most {BLOCK} tokens"
        used = tokens > 0
        return (nats[used], size[used], tokens[used]), name


def ratio_stderr(numerator: Floats, denominator: Floats) -> float | None:
    """Standard error of ``sum(numerator) / sum(denominator)`` over units, by linearisation.

    Args:
        numerator: [n] per unit.
        denominator: [n] per unit, positive.

    Returns:
        sqrt(n/(n-1) sum (a_i - R b_i)^2) / sum b, or None for fewer than two units.
    """
    n = len(numerator)
    if n < 2:
        return None
    total = float(denominator.sum())
    residual = numerator - float(numerator.sum()) / total * denominator
    return math.sqrt(n / (n - 1) * float((residual**2).sum())) / total
