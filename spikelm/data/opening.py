"""Which source a specification names; the table stands in :mod:`spikelm.data.source`."""

from __future__ import annotations

import glob
import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from spikelm.data.binidx import binidx
from spikelm.data.compressed import plain_suffix
from spikelm.data.files import (
    JSONL_SUFFIXES,
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    Chain,
    Folder,
    Jsonl,
    TextFile,
    files_below,
)
from spikelm.data.hub import PREFIX, HubData, saved_data
from spikelm.data.python_docs import PythonDocs
from spikelm.data.remote import RemoteFile, remote_glob
from spikelm.data.source import PARTS, Source, part_of
from spikelm.data.stored import stored_tokens
from spikelm.data.tables import Table
from spikelm.errors import DataError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spikelm.data.compressed import Place

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z0-9]+::")
_MAGIC = re.compile(r"[*?[]")
_SPLIT_NAMES = re.compile(r"(?<![a-z])(train|test|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)
_ABOUT = re.compile(r"(readme|license|licence|copying|notice|citation|changelog)", re.IGNORECASE)


def open_named(spec: str) -> Source:
    """The source of a specification; raises :class:`DataError` where there is none."""
    if spec.startswith("builtin:"):
        name, _, part = spec.removeprefix("builtin:").partition("#")
        if name != "python-docs":
            raise DataError(nearest("builtin source", name, ["python-docs"]))
        return part_of(PythonDocs(), part)
    if spec.startswith(PREFIX):
        return _hub(spec.removeprefix(PREFIX))
    if spec.lower().startswith("file://"):
        spec = urllib.parse.unquote(spec[len("file://") :])
    elif _URL.match(spec):
        return _remote(spec)
    return _local(spec)


def _hub(spec: str) -> Source:
    head, _, part = spec.rpartition("#")
    if "#" in head and part in PARTS:
        return part_of(HubData(head), part)
    return HubData(spec)


def _remote(spec: str) -> Source:
    url, *fragments = spec.split("#")
    # In the address of a web page ? begins a query.
    if _MAGIC.search(url if not RemoteFile(url).is_http else url.partition("?")[0]):
        return _files(url, remote_glob(url), fragments)
    return _file(RemoteFile(url), fragments)


def _local(spec: str) -> Source:
    place = spec
    fragments: list[str] = []
    while not Path(place).exists() and "#" in place:
        place, _, fragment = place.rpartition("#")
        fragments.insert(0, fragment)
    path = Path(place)
    if tokens := binidx(path):
        if fragments:
            raise DataError(f"{spec}: tokens have no fields and no parts; leave '#{'#'.join(fragments)}' out")
        return tokens
    if path.is_dir():
        return _folder(path, spec, fragments)
    if path.exists():
        return _file(path, fragments)
    if _MAGIC.search(place):
        found = sorted(name for name in glob.glob(place, recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"no file matches {place}")
        return _files(place, [Path(name) for name in found], fragments)
    raise DataError(
        f"there is no data source {path}; give an existing file or folder, a URL, hub:OWNER/NAME or "
        "builtin:python-docs"
    )


def _folder(path: Path, spec: str, fragments: list[str]) -> Source:
    if stored := stored_tokens(path):
        if fragments:
            raise DataError(f"{spec}: tokens have no fields and no parts; leave '#{'#'.join(fragments)}' out")
        return stored
    field = fragments[0] if fragments else ""
    if saved := saved_data(path, spec, field):
        return part_of(saved, _only_part(spec, fragments[1:]))
    records = files_below(path, RECORD_SUFFIXES)
    text = [file for file in files_below(path, TEXT_SUFFIXES) if not _ABOUT.match(file.name)]
    if text or not records:
        return part_of(Folder(path), _only_part(spec, fragments))
    splits = {name.lower() for file in records for name in _SPLIT_NAMES.findall(str(file.relative_to(path)))}
    if len(splits) > 1:
        raise DataError(
            f"folder {path} holds the splits {', '.join(sorted(splits))}; name one with "
            f"hub:{path}#{'train' if 'train' in splits else min(splits)}, or its files as {path}/*NAME*"
        )
    return _files(str(path), records, fragments)


def _files(name: str, files: Sequence[Place], fragments: list[str]) -> Source:
    records = [file for file in files if plain_suffix(file) in RECORD_SUFFIXES]
    if not records:
        return part_of(Chain(name, [TextFile(file) for file in files]), _only_part(name, fragments))
    if len(records) < len(files):
        other = next(file for file in files if file not in records)
        raise DataError(f"{name} matches both {records[0]} and {other}; name files of records or of text")
    field = fragments[0] if fragments else "text"
    chain = Chain(f"{name}#{field}", [_records(file, field) for file in files])
    return part_of(chain, _only_part(name, fragments[1:]))


def _file(file: Place, fragments: list[str]) -> Source:
    if plain_suffix(file) in RECORD_SUFFIXES:
        field = fragments[0] if fragments and fragments[0] else "text"
        return part_of(_records(file, field), _only_part(str(file), fragments[1:]))
    if fragments:
        raise DataError(
            f"{file}#{'#'.join(fragments)}: '#{fragments[0]}' names a field, which only "
            f"{' '.join(RECORD_SUFFIXES)} files have; leave it out"
        )
    return TextFile(file)


def _records(file: Place, field: str) -> Source:
    return Jsonl(file, field) if plain_suffix(file) in JSONL_SUFFIXES else Table(file, field)


def _only_part(spec: str, fragments: list[str]) -> str:
    if len(fragments) > 1:
        raise DataError(f"{spec}: '#{fragments[-1]}' is one too many; expected at most a field and a part")
    return fragments[0] if fragments else ""
