"""Sources of documents: what ``--data`` and ``data:`` in a configuration name.

| specification | documents |
| --- | --- |
| ``book.txt``, ``book.txt.xz`` (.gz, .zst) | the whole file is one |
| ``folder`` | one per text file, recursive, in sorted order |
| ``file.jsonl#field`` (.ndjson, also compressed) | the field of every line; ``text`` unless named |
| ``file.parquet#field``, ``file.arrow#field`` | the field of every row; ``text`` unless named |
| ``folder#field`` of such files and no text | the field of all their rows, file by file in sorted order |
| ``shards/*.parquet#field``, ``books/**/*.txt`` | all files that match, in sorted order |
| ``https://...``, ``s3://...``, ``memory://...`` | a file as above, read as a stream |
| ``hub:OWNER/NAME[:CONFIG][@REVISION][?stream][#SPLIT[.FIELD]]`` | a data set of the Hub |
| ``hub:FOLDER[...]`` | a local folder in the layout of such a data set |
| ``folder[#SPLIT.FIELD]`` from ``save_to_disk`` | the rows of a saved data set |
| ``builtin:python-docs`` | the language reference and library docstrings every Python carries |
| ``folder`` of a token store, ``name.bin`` with ``name.idx`` | tokens that exist already |

A further ``#train`` or ``#valid`` is a split by a hash of the document, about 5% of the documents held out
(``folder#valid``, ``file.jsonl#text#valid``). Text is taken as it is: no line ending or space is changed
(only a UTF-8 byte-order mark at the start of a file is dropped), so that bits per byte are those of the file.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spikelm.errors import DataError, nearest

if TYPE_CHECKING:
    from spikelm.data.store import TokenStore
    from spikelm.tokenizer import Tokenizer

PARTS = ("train", "valid")
_VALID_SHARE = 0.05


class Source(ABC):
    """Text documents in a fixed order.

    Attributes:
        name: the specification it was opened with.
        kind: what it is, in a few words.
    """

    kind = "documents"

    def __init__(self, name: str) -> None:
        self.name = name

    def documents(self) -> Iterator[str]:
        """Every document that is not empty, in the same order each time.

        Raises:
            DataError: a file is missing, damaged or not UTF-8, or there is no document at all.
        """
        empty = True
        for text in self._documents():
            if text:
                empty = False
                yield text
        if empty:
            raise DataError(f"{self.name} holds no text; give a source with at least one document")

    @abstractmethod
    def _documents(self) -> Iterator[str]:
        """Every document; empty ones may be among them."""

    def fields(self) -> dict[str, str]:
        """Names and types of the fields of a record, where it has records (those of the first file or line).

        Raises:
            DataError: the source is missing or damaged.
        """
        return {}

    @abstractmethod
    def fingerprint(self) -> str:
        """What changes when the documents may have changed, cheap to compute; the key of caches."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class TokenSource(Source):
    """Tokens that exist already: a source that is opened, not tokenised."""

    @abstractmethod
    def open_tokens(
        self, tokenizer: Tokenizer, cache_dir: Path, on_progress: Callable[[int], None] | None
    ) -> TokenStore:
        """The tokens as a store.

        Args:
            tokenizer: what they must have been made with.
            cache_dir: where to keep what is found out about them.
            on_progress: called with the number of bytes of text done, where they have to be counted.

        Raises:
            DataError: they are damaged or another tokenizer's.
        """

    def _documents(self) -> Iterator[str]:
        raise DataError(f"{self.name} holds tokens, not text; give the text that they were made from")


class Split(Source):
    """The documents of ``source`` that belong to ``part``, chosen by a hash of their text.

    Equal documents always fall into the same part, and adding documents moves no other.
    """

    def __init__(self, source: Source, part: str) -> None:
        super().__init__(f"{source.name}#{part}")
        self._source, self._part = source, part
        self.kind = f"{'held-out' if part == 'valid' else 'training'} share of: {source.kind}"

    def fields(self) -> dict[str, str]:
        """See :class:`Source`."""
        return self._source.fields()

    def _documents(self) -> Iterator[str]:
        total = kept = 0
        for text in self._source.documents():
            total += 1
            if is_valid(text) == (self._part == "valid"):
                kept += 1
                yield text
        if not kept:
            share = "held-out" if self._part == "valid" else "training"
            count = "1 document" if total == 1 else f"{total} documents"
            raise DataError(
                f"{self.name}: the {share} share of {count} is empty (a hash holds out about "
                f"{_VALID_SHARE:.0%}); give more documents, or a source of its own for each part"
            )

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return f"{self._source.fingerprint()}#{self._part}"


def is_valid(text: str) -> bool:
    """Whether the document belongs to the held-out part (about 5% of documents)."""
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < _VALID_SHARE * 2.0**64


def open_source(spec: str | Path) -> Source:
    """The source that ``spec`` names (see the module); files are checked for existence, not yet read.

    Raises:
        DataError: nothing of that name exists, or the part after ``#`` is not understood.
    """
    from spikelm.data.opening import open_named

    text = str(spec)
    if not text:
        raise DataError(
            "the data source is empty; give a file, a folder, file.jsonl#field or builtin:python-docs"
        )
    return open_named(text)


def part_of(source: Source, part: str) -> Source:
    """``source``, or the part of it that is named.

    Raises:
        DataError: there is no such part.
    """
    if part and part not in PARTS:
        raise DataError(f"{source.name}#{part}: {nearest('part', part, PARTS)}")
    return Split(source, part) if part else source
