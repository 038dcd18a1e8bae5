"""Reading many token sequences with one recurrent model, every shared prefix once.

Edges of the prefix tree (:mod:`spikelm.evaluation.tasks.prefixes`) are read side by side as rows of a batch,
each from a copy of the state at its parent's end. Edges of similar length go together, the deepest first, so
that few states wait. On the integer path a score has the same bits however the work is cut; on the float path
it differs in the last digits, as it does for any other batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikelm import state as states
from spikelm.errors import DataError
from spikelm.evaluation.scoring import LOGITS_PER_CHUNK, LanguageModel
from spikelm.evaluation.tasks.prefixes import Edge, Tokens, separate, shared
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.state import State

WINDOW = 8
"""Edges for a batch are looked for among the newest ``WINDOW * batch_size`` that wait."""
SLACK = 8
"""Edges of one batch are at most twice as long as the first, and at least half as long, give or take this."""


@dataclass(frozen=True)
class Scored:
    """What the model made of the scored part of a sequence.

    Args:
        logprobs: float64 [n], natural logarithm of the probability of each scored token.
        greedy: bool [n], whether it was the most likely one.
    """

    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


@dataclass(frozen=True)
class Ended:
    """Sequences that have just been read to their end.

    Args:
        sequences: their indices, m of them.
        logits: [m, V] of the next token.
        state: of m sequences.
    """

    sequences: list[int]
    logits: Tensor
    state: State


@dataclass
class _Waiting:
    """An edge and the state of one sequence it goes on from."""

    edge: Edge
    state: State


@dataclass(frozen=True)
class _Part:
    """Some columns of a batch of edges: features [k, T, F] of the k longest, and their state afterwards."""

    edges: list[Edge]
    column: int
    features: Tensor
    state: State
    finished: list[int]


class Reader:
    """Reads sequences of tokens.

    Args:
        model: maps tokens [B, T] and a state to logits [B, T, V] and a state, in evaluation mode.
        vocab_size: V.
        device: where the model is.
        batch_size: edges read side by side.
        chunk: columns read at once.
        share: whether shared prefixes are read once.
        advance: called with a number of tokens just read, for progress.

    Attributes:
        tokens_read: tokens the model was given so far.
        tokens_asked: tokens of all sequences so far, what it would have been given without sharing.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        vocab_size: int,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        chunk: int = 256,
        share: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.vocab_size, self.device = model, vocab_size, device
        self.batch_size, self.chunk, self.share = batch_size, chunk, share
        self.tokens_read = self.tokens_asked = 0
        self.advance = advance
        self._separate_head = False

    def score(self, sequences: Sequence[Sequence[int] | Tokens], first: Sequence[int]) -> list[Scored]:
        """Probabilities of the tokens from ``first`` on, each given all before it.

        Args:
            sequences: token ids, whole.
            first: per sequence the position of its first scored token, at least 1 and below its length.

        Raises:
            DataError: an impossible ``first``, a token outside the vocabulary, or logits that are not finite.
        """
        whole = [self._tokens(tokens) for tokens in sequences]
        for tokens, at in zip(whole, first, strict=True):
            if not 1 <= at < len(tokens):
                raise DataError(
                    f"the first scored token is number {at} of {len(tokens)}; expected a token with another "
                    "before it"
                )
        begin = np.asarray(first, dtype=np.int64) - 1  # the input that predicts the first scored token
        logprobs = [np.zeros(len(t) - 1 - int(b)) for t, b in zip(whole, begin, strict=True)]
        greedy = [np.zeros(len(values), dtype=np.bool_) for values in logprobs]
        for part in self._parts([tokens[:-1] for tokens in whole]):
            wanted = _wanted(part, whole, begin)
            if not wanted:
                continue
            places = np.concatenate([item.places for item in wanted])
            targets = np.concatenate([item.targets for item in wanted])
            values, best = self._judge(part, places, targets)
            cuts = np.cumsum([len(item.places) for item in wanted])[:-1]
            pieces = zip(np.split(values, cuts), np.split(best, cuts), strict=True)
            for item, (value, likeliest) in zip(wanted, pieces, strict=True):
                there = slice(item.offset, item.offset + len(value))
                logprobs[item.sequence][there], greedy[item.sequence][there] = value, likeliest
        for number, values in enumerate(logprobs):
            if not np.isfinite(values).all():
                raise DataError(
                    f"the log-likelihood of sequence {number} is not finite; the checkpoint's weights or its "
                    "dtype cannot be evaluated"
                )
        return [Scored(a, b) for a, b in zip(logprobs, greedy, strict=True)]

    def likeliest(
        self, sequences: Sequence[Sequence[int] | Tokens], places: Sequence[Sequence[int] | Tokens]
    ) -> list[NDArray[np.int64]]:
        """The token that the model thinks likeliest after given positions.

        Args:
            sequences: token ids.
            places: per sequence positions in it, ascending.

        Returns:
            Per sequence int64 [n], the most likely next token after each of its places.
        """
        inputs = [self._tokens(tokens) for tokens in sequences]
        asked = [np.asarray(own, dtype=np.int64) for own in places]
        found = [np.zeros(len(own), dtype=np.int64) for own in asked]
        for part in self._parts(inputs):
            for row, edge in enumerate(part.edges):
                left = edge.start + part.column
                right = min(edge.stop, left + part.features.shape[1])
                for sequence in edge.sequences:
                    low, high = np.searchsorted(asked[sequence], [left, right])
                    if low < high:
                        there = row * part.features.shape[1] + asked[sequence][low:high] - left
                        found[sequence][low:high] = self._likeliest(part, there)
        return found

    def ends(self, sequences: Sequence[Sequence[int] | Tokens], room: int = 0) -> Iterator[Ended]:
        """Read every sequence to its end; each comes once, in the order in which they end.

        Args:
            sequences: token ids, at least one each.
            room: further tokens to make room for where memory grows.
        """
        inputs = [self._tokens(tokens) for tokens in sequences]
        for part in self._parts(inputs, room):
            for row in part.finished:
                edge = part.edges[row]
                here = [index for index in edge.sequences if len(inputs[index]) == edge.stop]
                if not here:
                    continue
                with torch.inference_mode():
                    last = part.features[row : row + 1, edge.length - part.column - 1]
                    logits = self._logits(last, part.state)
                    rows = torch.full((len(here),), row, device=last.device)
                    state = states.select_rows(part.state, rows)
                yield Ended(here, logits.expand(len(here), -1), state)

    def counted(self, tokens: int) -> None:
        """Note that the model was given so many tokens."""
        self.tokens_read += tokens
        if self.advance is not None:
            self.advance(tokens)

    def _tokens(self, tokens: Sequence[int] | Tokens) -> Tokens:
        found = np.asarray(tokens, dtype=np.int64)
        if not len(found):
            raise DataError("a sequence has no token; give at least one")
        if found.min() < 0 or found.max() >= self.vocab_size:
            raise DataError(
                f"the text has token {int(found.max())}, but the model has {self.vocab_size} tokens; use the "
                "tokenizer the model was trained with"
            )
        return found

    def _parts(self, inputs: list[Tokens], room: int = 0) -> Iterator[_Part]:
        """Read all inputs; children wait until their parent is done."""
        if not inputs:
            return
        self.tokens_asked += sum(len(tokens) for tokens in inputs)
        roots = shared(inputs) if self.share else separate(inputs)
        with torch.inference_mode():
            longest = max(len(tokens) for tokens in inputs) + room
            initial = self.model.init_state(1, self.device, None, longest)
        self._separate_head = isinstance(self.model, SpikeLM) and not initial.get("head")
        waiting = [_Waiting(edge, initial) for edge in roots]
        del initial
        while waiting:
            batch = self._next_batch(waiting)
            for part in self._read(batch, inputs):
                for row in part.finished:
                    if children := part.edges[row].children:
                        with torch.inference_mode():
                            at = torch.tensor([row], device=part.features.device)
                            own = states.select_rows(part.state, at)
                        waiting += [_Waiting(child, own) for child in children]
                yield part

    def _next_batch(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Take the newest edge that waits and others of similar length, longest first."""
        length = waiting[-1].edge.length
        batch: list[_Waiting] = []
        kept: list[_Waiting] = []
        limit = WINDOW * self.batch_size
        for _ in range(min(limit, len(waiting))):
            item = waiting.pop()
            fits = length // 2 - SLACK <= item.edge.length <= 2 * length + SLACK
            (batch if fits and len(batch) < self.batch_size else kept).append(item)
            if len(batch) == self.batch_size:
                break
        waiting += reversed(kept)
        return sorted(batch, key=lambda item: -item.edge.length)

    def _read(self, batch: list[_Waiting], inputs: list[Tokens]) -> Iterator[_Part]:
        """Read a batch of edges, longest first, in chunks of columns; rows that are done are left out."""
        edges = [item.edge for item in batch]
        lengths = [edge.length for edge in edges]
        with torch.inference_mode():
            state = _gathered([item.state for item in batch], self.device)
        batch.clear()  # the parents' states are no longer needed
        limit = self.chunk
        if not self._separate_head:
            limit = max(1, min(limit, LOGITS_PER_CHUNK // (len(edges) * self.vocab_size)))
        column = 0
        while column < lengths[0]:
            rows = sum(length > column for length in lengths)
            width = min(limit, lengths[0] - column)
            tokens = torch.zeros(rows, width, dtype=torch.int64)
            valid = torch.zeros(rows, width, dtype=torch.bool)
            for row, edge in enumerate(edges[:rows]):
                stop = min(edge.stop, edge.start + column + width)
                piece = inputs[edge.sequences[0]][edge.start + column : stop]
                tokens[row, : len(piece)] = torch.from_numpy(piece)
                valid[row, : len(piece)] = True
            count = int(valid.sum())
            ctx = Context(valid=None if count == valid.numel() else valid.to(self.device))
            with torch.inference_mode():
                if column and rows < (states.batch_size(state) or 0):
                    state = states.select_rows(state, torch.arange(rows, device=self.device))
                features, state = self._features(tokens.to(self.device), state, ctx)
            self.counted(count)
            finished = [row for row in range(rows) if lengths[row] <= column + width]
            yield _Part(edges[:rows], column, features, state, finished)
            column += width

    def _features(self, tokens: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        if self._separate_head:
            return cast(SpikeLM, self.model).hidden(tokens, state, ctx)
        return self.model(tokens, state, ctx)

    def _logits(self, features: Tensor, state: State) -> Tensor:
        """Logits [K, V] of features [K, F]."""
        if self._separate_head:
            return cast(SpikeLM, self.model).head_logits(features[None], {**state, "head": {}})[0][0]
        return features

    def _logits_at(
        self, part: _Part, places: NDArray[np.int64]
    ) -> Iterator[tuple[Tensor, NDArray[np.int64], Tensor]]:
        """Logits at places (row * T + column), which may repeat, of bounded size at once.

        Yields:
            logits [K, V], the indices of the places they serve [M], and the row of each of those [M].
        """
        unique, back = np.unique(places, return_inverse=True)
        flat = part.features.flatten(0, 1)
        size = max(1, LOGITS_PER_CHUNK // self.vocab_size)
        for start in range(0, len(unique), size):
            served = np.flatnonzero((back >= start) & (back < start + size))
            chosen = torch.from_numpy(unique[start : start + size]).to(flat.device)
            logits = self._logits(flat.index_select(0, chosen), part.state)
            rows = torch.from_numpy(back[served] - start).to(flat.device)
            yield (logits if logits.dtype == torch.float64 else logits.float()), served, rows

    @torch.inference_mode()
    def _judge(
        self, part: _Part, places: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of the target at every place, and whether it is the likeliest."""
        values, best = np.empty(len(places)), np.empty(len(places), dtype=np.bool_)
        for logits, served, rows in self._logits_at(part, places):
            target = torch.from_numpy(targets[served]).to(logits.device)
            values[served] = logits.log_softmax(-1)[rows, target].double().cpu().numpy()
            best[served] = (logits.argmax(-1)[rows] == target).cpu().numpy()
        return values, best

    @torch.inference_mode()
    def _likeliest(self, part: _Part, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The likeliest token at every place."""
        found = np.empty(len(places), dtype=np.int64)
        for logits, served, rows in self._logits_at(part, places):
            if bool(logits.isnan().any()):
                raise DataError(
                    "the logits are not finite; the checkpoint's weights or its dtype cannot be evaluated"
                )
            found[served] = logits.argmax(-1)[rows].cpu().numpy()
        return found


@dataclass(frozen=True)
class _Wanted:
    """Scored tokens of a sequence that a part predicts: where, which, and their place among its scores."""

    sequence: int
    offset: int
    places: NDArray[np.int64]
    targets: NDArray[np.int64]


def _wanted(part: _Part, whole: list[Tokens], begin: NDArray[np.int64]) -> list[_Wanted]:
    found = []
    width = part.features.shape[1]
    for row, edge in enumerate(part.edges):
        left = edge.start + part.column
        right = min(edge.stop, left + width)
        for sequence in edge.sequences:
            start = max(left, int(begin[sequence]))
            if start >= right:
                continue
            places = row * width + np.arange(start - left, right - left)
            targets = whole[sequence][start + 1 : right + 1]
            found.append(_Wanted(sequence, start - int(begin[sequence]), places, targets))
    return found


def _gathered(parents: list[State], device: torch.device | str) -> State:
    """One state with a row for each of some states of one sequence; equal objects are copied once."""
    different = list({id(parent): parent for parent in parents}.values())
    place = {id(parent): number for number, parent in enumerate(different)}
    joined = states.tree_map(lambda *values: torch.cat(values), *different)
    return states.select_rows(joined, torch.tensor([place[id(parent)] for parent in parents], device=device))
