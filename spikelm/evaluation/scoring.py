"""Negative log-likelihood of every target of a stream of segments, in constant memory.

Segments are packed into a few rows and read in chunks: a row goes on with its next segment as soon as one
ends (``reset`` replaces the state there), so short and long documents cost what their tokens cost, and a
window of any length needs the memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikelm import state as states
from spikelm.codings import Coding
from spikelm.errors import DataError
from spikelm.evaluation.segments import Segment
from spikelm.meter import Meter
from spikelm.recurrence import Context
from spikelm.state import State

LOGITS_PER_CHUNK = 1 << 25
"""At most this many logits are held at once (128 MiB in float32), whatever the vocabulary."""


class LanguageModel(Protocol):
    """What scoring needs of a model."""

    def __call__(self, tokens: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State]:
        """Tokens [B, T] -> (logits [B, T, V], state)."""

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """State before the first token."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scored targets that follow one another in a document.

    Args:
        document: index of the document.
        first: index in the document of the first target.
        context: tokens the model had seen since its initial state when it predicted the first target.
        nats: float64 [n], -log p of each target.
        greedy: bool [n], whether each target was the likeliest token; None unless asked for.
    """

    document: int
    first: int
    context: int
    nats: NDArray[np.float64]
    greedy: NDArray[np.bool_] | None = None


@dataclass
class _Row:
    """One row of the batch: what it is reading and how far it has come."""

    segment: Segment | None
    offset: int = 0

    @property
    def left(self) -> int:
        return 0 if self.segment is None else len(self.segment.inputs) - self.offset


@dataclass(frozen=True)
class _Piece:
    """Where a part of a segment lies in the chunk."""

    row: int
    column: int
    length: int
    segment: Segment
    offset: int


class _Packer:
    """Hands out chunks [B, T] of a stream of segments."""

    def __init__(self, segments: Iterable[Segment], rows: int) -> None:
        self._segments = iter(segments)
        self.rows = [row for row in (_Row(next(self._segments, None)) for _ in range(rows)) if row.segment]
        self._exhausted = False

    def drop_finished(self) -> list[int]:
        """Forget rows that will get nothing more; the indices of those that stay."""
        for row in self.rows:
            if row.left == 0:
                self._advance(row)
        stay = [index for index, row in enumerate(self.rows) if row.segment is not None]
        self.rows = [self.rows[index] for index in stay]
        return stay

    def _advance(self, row: _Row) -> None:
        row.segment = None if self._exhausted else next(self._segments, None)
        row.offset = 0
        if row.segment is None:
            self._exhausted = True

    def chunk(self, length: int) -> list[_Piece]:
        """Fill every row up to ``length`` columns."""
        pieces = []
        for index, row in enumerate(self.rows):
            column = 0
            while column < length and row.segment is not None:
                if row.left == 0:
                    self._advance(row)
                    continue
                count = min(row.left, length - column)
                pieces.append(_Piece(index, column, count, row.segment, row.offset))
                row.offset += count
                column += count
        return pieces


def score(
    model: LanguageModel,
    segments: Iterable[Segment],
    *,
    vocab_size: int,
    batch_size: int = 8,
    chunk: int = 512,
    device: torch.device | str = "cpu",
    max_len: int | None = None,
    meter: Meter | None = None,
    coding: Coding | None = None,
    greedy: bool = False,
) -> Iterator[Scores]:
    """Score every segment; the order in which scores come is not that of the segments.

    Args:
        model: maps tokens [B, T] and a state to logits [B, T, V] and a state.
        segments: what to read, and which targets to skip.
        vocab_size: V; together with ``batch_size`` it bounds the columns of a chunk.
        batch_size: rows read side by side.
        chunk: columns of a chunk at most; changes speed and memory, not what is computed.
        device: where the model is.
        max_len: longest segment, for parts whose state grows.
        meter: counts the spikes of scored and context tokens alike, or None.
        coding: run expanded over its micro-steps, or None.
        greedy: also tell which targets were the likeliest token.

    Raises:
        DataError: if a loss is not finite.
    """
    packer = _Packer(segments, batch_size)
    state: State | None = None
    fresh = True
    while True:
        before = len(packer.rows)
        stay = packer.drop_finished()
        rows = len(stay)
        if rows == 0:
            return
        columns = max(1, min(chunk, LOGITS_PER_CHUNK // (rows * vocab_size)))
        pieces = packer.chunk(columns)
        width = max(piece.column + piece.length for piece in pieces)
        tokens, targets, reset, valid = _tensors(pieces, rows, width, fresh)
        ctx = Context(
            reset=reset.to(device) if bool(reset.any()) else None,
            valid=None if bool(valid.all()) else valid.to(device),
            meter=meter,
            coding=coding,
        )
        with torch.inference_mode():  # never across a yield: it would reach into the caller
            if state is None:
                state = model.init_state(rows, device, None, max_len)
            elif rows < before:
                state = states.select_rows(state, torch.tensor(stay, device=device))
            logits, state = model(tokens.to(device), state, ctx)
            nats = _nats(logits, targets.to(device))
            hits = (logits.argmax(-1).cpu() == targets).numpy() if greedy else None
        fresh = False
        yield from _collect(nats, hits, pieces)


def _tensors(
    pieces: list[_Piece], rows: int, width: int, fresh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.zeros(rows, width, dtype=torch.long)
    targets = torch.zeros(rows, width, dtype=torch.long)
    reset = torch.zeros(rows, width, dtype=torch.bool)
    valid = torch.zeros(rows, width, dtype=torch.bool)
    for piece in pieces:
        here = slice(piece.column, piece.column + piece.length)
        there = slice(piece.offset, piece.offset + piece.length)
        tokens[piece.row, here] = torch.from_numpy(piece.segment.inputs[there].astype(np.int64))
        targets[piece.row, here] = torch.from_numpy(piece.segment.targets[there].astype(np.int64))
        valid[piece.row, here] = True
        # The first column of a fresh state needs no reset; a sequence without one takes the plain path.
        if piece.offset == 0 and not (fresh and piece.column == 0):
            reset[piece.row, piece.column] = True
    return tokens, targets, reset, valid


def _nats(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """-log p of every target, [B, T]."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).to(dtype), targets.flatten(), reduction="none"
    )
    nats: NDArray[np.float64] = losses.view(targets.shape).to("cpu", torch.float64).numpy()
    return nats


def _collect(
    nats: NDArray[np.float64], hits: NDArray[np.bool_] | None, pieces: list[_Piece]
) -> Iterator[Scores]:
    for piece in pieces:
        begin = max(piece.segment.skip - piece.offset, 0)
        if begin >= piece.length:
            continue
        columns = slice(piece.column + begin, piece.column + piece.length)
        values = nats[piece.row, columns]
        first = piece.segment.first + piece.offset + begin
        if not np.isfinite(values).all():
            at = first + int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(
                f"the loss is not finite at token {at} of document {piece.segment.document}; "
                f"the checkpoint's weights or its dtype cannot be evaluated"
            )
        yield Scores(
            document=piece.segment.document,
            first=first,
            context=piece.offset + begin + 1,
            nats=values.copy(),
            greedy=None if hits is None else hits[piece.row, columns].copy(),
        )
