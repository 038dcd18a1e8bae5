"""Which tokens are predicted from which: the three ways to cut a document for a recurrent model.

A document of tokens ``x[0..N-1]`` is a chain of N - 1 predictions, ``x[i]`` from what came before. Every way
scores each of them exactly once; they differ in how much of the past the model may remember. A start token,
where one is used, is ``x[0]``, so that the document's own first token is scored too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikelm.errors import ConfigError

Tokens = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of one document that is read from the initial state.

    Args:
        document: index of the document.
        first: index in the document of the segment's first target.
        inputs: int32 [n], fed one after another from the initial state.
        targets: int32 [n], the token after each input.
        skip: the first ``skip`` targets are context only; they are scored elsewhere.
    """

    document: int
    first: int
    inputs: Tokens
    targets: Tokens
    skip: int = 0


def carried(documents: Sequence[Tokens]) -> Iterator[Segment]:
    """Whole documents: the state is carried from the first token to the last."""
    for index, tokens in enumerate(documents):
        if len(tokens) > 1:
            yield Segment(document=index, first=1, inputs=tokens[:-1], targets=tokens[1:])


def strided(documents: Sequence[Tokens], length: int, stride: int) -> Iterator[Segment]:
    """Windows of ``length`` inputs that begin every ``stride`` tokens.

    The first window of a document scores all its targets, each later one its last ``stride``: apart from the
    first window every target has at least ``length - stride + 1`` tokens before it.

    Raises:
        ConfigError: unless 1 <= stride <= length.
    """
    if not 1 <= stride <= length:
        raise ConfigError(f"stride {stride} with length {length}; expected 1 <= stride <= length")
    for index, tokens in enumerate(documents):
        predictions = len(tokens) - 1
        start, scored = 0, 0
        while scored < predictions:
            end = min(start + length, predictions)
            yield Segment(
                document=index,
                first=start + 1,
                inputs=tokens[start:end],
                targets=tokens[start + 1 : end + 1],
                skip=scored - start,
            )
            scored = end
            start += stride


def disjoint(documents: Sequence[Tokens], length: int) -> Iterator[Segment]:
    """Windows of ``length`` inputs side by side, each from the initial state."""
    return strided(documents, length, length)
