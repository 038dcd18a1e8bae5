"""Documents in files: plain text, folders of text, JSON lines."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.data.compressed import decode_utf8, open_bytes, plain_suffix, read_bytes
from spikelm.data.source import Source
from spikelm.errors import DataError, nearest

if TYPE_CHECKING:
    from spikelm.data.compressed import Place

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".tokens", ".raw"})
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
RECORD_SUFFIXES = (*JSONL_SUFFIXES, *PARQUET_SUFFIXES, *ARROW_SUFFIXES)
"""Files of records, of which one field is the document."""


class TextFile(Source):
    """A file that is one document, whatever its name ends with; .xz, .gz and .zst are uncompressed."""

    kind = "text file"

    def __init__(self, path: Place) -> None:
        super().__init__(str(path))
        self._path = path

    def _documents(self) -> Iterator[str]:
        data = read_bytes(self._path)
        mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        yield decode_utf8(data[mark:] if mark else data, str(self._path), offset=mark)

    def fingerprint(self) -> str:
        """Absolute path, size and time of the last change."""
        return f"text:{stamp(self._path)}"


class Chain(Source):
    """Several sources one after another.

    Args:
        name: what to call them together.
        sources: at least one.
    """

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        super().__init__(name)
        self._sources = tuple(sources)
        self.kind = f"{len(self._sources)} files, the first a {self._sources[0].kind}"

    def fields(self) -> dict[str, str]:
        """See :class:`Source`."""
        return self._sources[0].fields()

    def _documents(self) -> Iterator[str]:
        for source in self._sources:
            yield from source._documents()

    def fingerprint(self) -> str:
        """Those of all."""
        return "chain:" + "|".join(source.fingerprint() for source in self._sources)


class Folder(Source):
    """The text files below a folder, by their relative path in code-point order.

    Files and folders whose name begins with a dot are left out, and links to folders are not followed.
    """

    kind = "folder of text files"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        if not self._files():
            endings = " ".join(sorted(TEXT_SUFFIXES))
            raise DataError(
                f"folder {path} holds no text files (looked for {endings}, also compressed) and no "
                f"{' '.join(RECORD_SUFFIXES)} files"
            )

    def _files(self) -> list[Path]:
        return files_below(self._path, TEXT_SUFFIXES)

    def _documents(self) -> Iterator[str]:
        for path in self._files():
            yield from TextFile(path)._documents()

    def fingerprint(self) -> str:
        """Those of all its files."""
        return "folder:" + "|".join(stamp(path) for path in self._files())


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files below a folder with one of these endings (compressed or not), by relative path.

    Raises:
        DataError: a folder cannot be read.
    """
    found = []
    for where, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(where)
        found += [
            here / name for name in names if not name.startswith(".") and plain_suffix(Path(name)) in suffixes
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


class Jsonl(Source):
    """One JSON object per line; the document is its string ``field``."""

    kind = "file of JSON lines"

    def __init__(self, path: Place, field: str) -> None:
        super().__init__(f"{path}#{field}")
        self._path, self._field = path, field

    def _documents(self) -> Iterator[str]:
        offset = 0
        with open_bytes(self._path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield self._document(line, number, offset)
                offset += len(line)

    def fields(self) -> dict[str, str]:
        """See :class:`Source`."""
        with open_bytes(self._path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    record = self._record(line, number, 0)
                    return {str(key): type(value).__name__ for key, value in record.items()}
        return {}

    def _record(self, line: bytes, number: int, offset: int) -> dict[str, Any]:
        where = f"{self._path} line {number} (byte {offset})"
        if offset == 0 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        try:
            record = json.loads(decode_utf8(line, f"{self._path} line {number}", offset))
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise DataError(f"{where} nests JSON too deeply") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} holds a JSON {type(record).__name__} where an object was expected")
        return record

    def _document(self, line: bytes, number: int, offset: int) -> str:
        where = f"{self._path} line {number} (byte {offset})"
        record = self._record(line, number, offset)
        if self._field not in record:
            raise DataError(f"{where}: {nearest('field', self._field, record)}")
        text = record[self._field]
        if not isinstance(text, str):
            raise DataError(
                f"{where}: field {self._field!r} holds a {type(text).__name__} where text was expected"
            )
        return text

    def fingerprint(self) -> str:
        """Absolute path, size, time of the last change, and the field."""
        return f"jsonl:{self._field}:{stamp(self._path)}"


def stamp(path: Place) -> str:
    """What changes when a file does: place, size and time of the last change (or what a server tells).

    Raises:
        DataError: it cannot be looked at.
    """
    if not isinstance(path, Path):
        return path.stamp()
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _refuse(error: OSError) -> None:
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror or error}") from error
