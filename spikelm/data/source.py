"""Sources of documents: what ``--data`` and ``data:`` in a configuration name.

| specification | documents |
| --- | --- |
| ``book.txt``, ``book.txt.xz`` (.gz, .zst) | the whole file is one |
| ``folder`` | one per text file, recursive, in sorted order |
| ``file.jsonl#field`` (also compressed) | the field of every line; the field is ``text`` unless named |
| ``builtin:python-docs`` | the language reference and library docstrings every Python carries |

A folder and the builtin take ``#train`` or ``#valid``: a split by a hash of the document, about 5% of the
documents held out. Text is taken as it is: no line ending or space is changed (only a UTF-8 byte-order mark
at the start of a file is dropped), so that bits per byte are those of the file.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spikelm.data.compressed import plain_suffix
from spikelm.errors import DataError, nearest

if TYPE_CHECKING:
    from spikelm.data.store import TokenStore
    from spikelm.tokenizer import Tokenizer

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARTS = ("train", "valid")
_VALID_SHARE = 0.05


class Source(ABC):
    """Text documents in a fixed order.

    Attributes:
        name: the specification it was opened with.
    """

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
    from spikelm.data.files import Folder, Jsonl, TextFile
    from spikelm.data.python_docs import PythonDocs
    from spikelm.data.stored import stored_tokens

    text = str(spec)
    if not text:
        raise DataError(
            "the data source is empty; give a file, a folder, file.jsonl#field or builtin:python-docs"
        )
    if text.startswith("builtin:"):
        name, _, part = text.removeprefix("builtin:").partition("#")
        if name != "python-docs":
            raise DataError(nearest("builtin source", name, ["python-docs"]))
        return _part(PythonDocs(), text, part)
    path, part = Path(text), ""
    if not path.exists() and "#" in text:
        head, _, part = text.rpartition("#")
        path = Path(head)
    if not path.exists():
        raise DataError(
            f"there is no data source {path}; give an existing file or folder or builtin:python-docs"
        )
    if path.is_dir() and (stored := stored_tokens(path)):
        return stored
    if path.is_dir():
        return _part(Folder(path), text, part)
    if plain_suffix(path) in JSONL_SUFFIXES:
        return Jsonl(path, part or "text")
    if part:
        raise DataError(f"{text}: '#{part}' names a field, which only .jsonl files have; leave it out")
    return TextFile(path)


def _part(source: Source, spec: str, part: str) -> Source:
    if part and part not in PARTS:
        raise DataError(f"{spec}: {nearest('part', part, PARTS)}")
    return Split(source, part) if part else source
