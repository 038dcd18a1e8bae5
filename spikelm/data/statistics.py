"""Figures about documents and tokens: how many, how long, how many twice, which tokens are used."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spikelm.data.plain_text import utf8
from spikelm.data.store import TokenStore, check_tokens

QUANTILES = (1, 5, 25, 50, 75, 95, 99)
"""Percent of the documents that are at most as long."""
_STRIDE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of documents.

    Attributes:
        count, total: documents, and the sum of their lengths.
        mean, shortest, longest: of the lengths.
        longest_document: number of the longest document, from 0.
        quantiles: length by percent, see :data:`QUANTILES`.
    """

    count: int
    total: int
    mean: float
    shortest: int
    longest: int
    longest_document: int
    quantiles: dict[int, int]

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64]) -> Lengths:
        """Those of an array [documents] that is not empty."""
        places = np.percentile(lengths, QUANTILES, method="inverted_cdf")
        return cls(
            count=len(lengths),
            total=int(lengths.sum()),
            mean=float(lengths.mean()),
            shortest=int(lengths.min()),
            longest=int(lengths.max()),
            longest_document=int(lengths.argmax()),
            quantiles={q: int(value) for q, value in zip(QUANTILES, places, strict=True)},
        )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Figures about documents as text.

    Attributes:
        lengths: in UTF-8 bytes.
        characters, lines: Unicode characters, and line breaks.
        duplicates, duplicate_bytes: documents equal to an earlier one, and their bytes.
    """

    lengths: Lengths
    characters: int
    lines: int
    duplicates: int
    duplicate_bytes: int


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Figures about documents as tokens.

    Attributes:
        lengths: in tokens, an end-of-document token included.
        num_bytes: UTF-8 bytes of text.
        vocab_size, used: ids of the tokenizer, and how many of them occur.
        frequent: the most frequent ids with their counts, most frequent first.
        duplicates: documents equal to an earlier one.
    """

    lengths: Lengths
    num_bytes: int
    vocab_size: int
    used: int
    frequent: list[tuple[int, int]]
    duplicates: int


def text_statistics(documents: Iterable[str], on_progress: Callable[[int], None] | None = None) -> Texts:
    """Read documents once; 16 bytes per different document are kept.

    Args:
        documents: at least one.
        on_progress: called with the bytes of every document.

    Raises:
        DataError: a document is not Unicode.
    """
    lengths, seen = array("q"), set[bytes]()
    characters = lines = duplicates = duplicate_bytes = 0
    for text in documents:
        data = utf8(text)
        lengths.append(len(data))
        characters += len(text)
        lines += text.count("\n")
        if not _new(data, seen):
            duplicates += 1
            duplicate_bytes += len(data)
        if on_progress is not None:
            on_progress(len(data))
    return Texts(
        lengths=Lengths.of(np.frombuffer(lengths, dtype=np.int64)),
        characters=characters,
        lines=lines,
        duplicates=duplicates,
        duplicate_bytes=duplicate_bytes,
    )


def token_statistics(store: TokenStore, on_progress: Callable[[int], None] | None = None) -> Tokens:
    """Read the tokens of a store.

    Args:
        store: tokens; all are checked.
        on_progress: called with the number of tokens read, twice as many in all as there are.

    Raises:
        DataError: the store is damaged.
    """
    index = store.index
    counts = np.zeros(index.vocab_size, dtype=np.int64)
    for at in range(0, index.num_tokens, _STRIDE):
        piece = store.read(at, at + _STRIDE)
        check_tokens(piece, index.vocab_size, store.where, at)
        counts += np.bincount(piece.astype(np.int64), minlength=index.vocab_size)
        if on_progress is not None:
            on_progress(len(piece))
    bounds = np.append(store.starts, index.num_tokens)
    seen, duplicates = set[bytes](), 0
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        duplicates += not _new(store.read(begin, end).tobytes(), seen)
        if on_progress is not None:
            on_progress(end - begin)
    order = np.argsort(-counts, kind="stable")[:10]
    return Tokens(
        lengths=Lengths.of(np.diff(bounds)),
        num_bytes=index.num_bytes,
        vocab_size=index.vocab_size,
        used=int((counts > 0).sum()),
        frequent=[(int(token), int(counts[token])) for token in order if counts[token]],
        duplicates=duplicates,
    )


def _new(data: Any, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True
