"""Which beginnings of many token sequences are worth reading once: a tree of shared prefixes.

A recurrent model that has read a prefix can go on from there as often as one likes: its state is copied.
Multiple-choice questions share their context, few-shot prompts their examples, questions their first words.
The tree is a compressed trie: an edge is a stretch of tokens that all sequences below it have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

LEAST = 16
"""Tokens that a shared stretch must save; one that saves less is read again for each sequence."""


@dataclass(eq=False)
class Edge:
    """Tokens ``start`` to ``stop`` (exclusive) of every sequence below it.

    Args:
        sequences: indices of the sequences that run through it.
        start: first position.
        stop: position after the last one.
        children: what follows; sequences in none of them end here.
    """

    sequences: list[int]
    start: int
    stop: int
    children: list[Edge] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the stretch."""
        return self.stop - self.start


def separate(sequences: Sequence[Tokens]) -> list[Edge]:
    """One edge per sequence: nothing is shared."""
    return [Edge([index], 0, len(tokens)) for index, tokens in enumerate(sequences)]


def shared(sequences: Sequence[Tokens], least: int = LEAST) -> list[Edge]:
    """The edges that begin at the initial state; every token of a worthwhile shared stretch stands once.

    Args:
        sequences: int64 [n] each, n >= 1; equal ones may occur.
        least: tokens that a stretch must save, at least 1.
    """
    if not sequences:
        return []
    # Big-endian bytes sort as the token ids do, and a prefix comes before what continues it.
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">u4").tobytes())
    common = np.zeros(len(order), dtype=np.int64)
    for place in range(1, len(order)):
        common[place] = _common(sequences[order[place - 1]], sequences[order[place]])
    roots: list[Edge] = []
    # Places low to high (inclusive) of the order, whose tokens before `start` are read, and where they go.
    waiting: list[tuple[int, int, int, list[Edge]]] = [(0, len(order) - 1, 0, roots)]
    while waiting:
        low, high, start, into = waiting.pop()
        if low == high:
            stop = len(sequences[order[low]])
            if stop > start:
                into.append(Edge([order[low]], start, stop))
            continue
        inside = common[low + 1 : high + 1]
        stop = int(inside.min())
        if (high - low) * (stop - start) >= least:
            edge = Edge(order[low : high + 1], start, stop)
            into.append(edge)
            start, into = stop, edge.children
        cuts = [low, *(low + 1 + np.flatnonzero(inside == stop)).tolist(), high + 1]
        waiting += [(a, b - 1, start, into) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return roots


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size
