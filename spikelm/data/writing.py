"""Writing a token store shard by shard, so that it can be interrupted at any moment and continued.

A shard is written into a folder of another name, is on disk before it is renamed, and is never changed again.
What stops in between (a kill, a full disk, a cut connection) costs the shard being written; the next run with
the same source reads up to where the last whole shard ends and goes on with the very same bytes. The
``index.json`` of the store comes last and makes it complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from spikelm.data.checksums import RunningChecksums, checksums
from spikelm.data.durable import (
    WRITING,
    host,
    replace_json,
    sync_folder,
    temporary_path,
    write_bytes,
    write_json,
)
from spikelm.data.encoding import Part, encode_documents
from spikelm.data.shards import (
    FORMAT_VERSION,
    HEADER_BYTES,
    Cursor,
    Shard,
    ShardIndex,
    npy_header,
    open_shard,
    read_checked_json,
    shard_folder,
)
from spikelm.data.source import Source
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import TokenArray, Tokenizer

SHARD_TOKENS = 100_000_000
"""Tokens of a shard unless chosen: 200 MB at two bytes each, what a kill costs at most."""
PLAN = "plan.json"
_OLD = 86400.0  # seconds after which another machine's unfinished shard is taken for abandoned


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a store is to hold; written first, so that only the same command continues it.

    Attributes:
        format_version: version of the layout.
        source: specification of the source.
        fingerprint: sha256 of the source's fingerprint.
        tokenizer: sha256 of the tokenizer.
        vocab_size: ids of the tokenizer.
        eos_id: token that ends every document, or None.
        dtype: ``uint16`` or ``uint32``.
        shard_tokens: tokens of every shard but the last.
    """

    format_version: int
    source: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    eos_id: int | None
    dtype: str
    shard_tokens: int

    @classmethod
    def of(cls, source: Source, tokenizer: Tokenizer, shard_tokens: int) -> Plan:
        """The plan for a source and a tokenizer."""
        if isinstance(shard_tokens, bool) or not isinstance(shard_tokens, int) or shard_tokens < 1:
            raise ConfigError(f"shard_tokens is {shard_tokens!r}; expected a positive number of tokens")
        return cls(
            format_version=FORMAT_VERSION,
            source=source.name,
            fingerprint=hashlib.sha256(source.fingerprint().encode(errors="surrogatepass")).hexdigest(),
            tokenizer=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=tokenizer.dtype.name,
            shard_tokens=shard_tokens,
        )

    @property
    def content(self) -> tuple[object, ...]:
        """What decides the tokens: all but the size of the shards and how the source was spelled."""
        return (self.fingerprint, self.tokenizer, self.eos_id, self.dtype)


def read_plan(folder: Path) -> Plan | None:
    """The plan of an unfinished store; None where there is none that can be read."""
    try:
        return Plan(
            **read_checked_json(folder / PLAN, "unfinished token store", {f.name for f in fields(Plan)})
        )
    except (DataError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Written:
    """A finished set of shards.

    Attributes:
        num_tokens, num_documents: in all shards.
        end: the end of the source.
        sha256: of all tokens, whatever the size of the shards.
        shards: checksum of the index of each.
    """

    num_tokens: int
    num_documents: int
    end: Cursor
    sha256: str
    shards: tuple[int, ...]


def write_shards(
    folder: Path,
    plan: Plan,
    source: Source,
    tokenizer: Tokenizer,
    workers: int,
    on_progress: Callable[[int], None] | None,
) -> Written:
    """Write the shards of a store, from where an earlier run with the same plan stopped.

    The caller holds the lock of ``folder``. What cannot be used (another plan, damaged shards, an unfinished
    one) is removed.

    Raises:
        DataError: the source is damaged or empty, or gives no tokens.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if read_plan(folder) != plan:
        _remove_shards(folder, 0)
        replace_json(folder / PLAN, asdict(plan), sync=False)
    _remove_unfinished(folder)
    writer = _Writer(folder, plan, tokenizer)
    try:
        writer.resume()
        start = writer.cursor.documents
        documents = islice(source.documents(), start, None)
        done = writer.cursor.num_bytes
        for part in encode_documents(documents, tokenizer, name=source.name, workers=workers, first=start):
            writer.add(part)
            done += part.num_bytes
            if on_progress is not None and (part.num_bytes or part.last):
                on_progress(done)
        if not writer.num_documents:
            raise DataError(f"{source.name} gives no tokens with {tokenizer!r}")
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the shards in a store, in order."""
    return sorted(int(p.name) for p in folder.iterdir() if re.fullmatch(r"\d{5,}", p.name))


class _Writer:
    def __init__(self, folder: Path, plan: Plan, tokenizer: Tokenizer) -> None:
        self._folder, self._plan, self._tokenizer = folder, plan, tokenizer
        ending = [] if plan.eos_id is None else [plan.eos_id]
        self._ending: TokenArray = np.array(ending, dtype=plan.dtype)
        self.cursor = Cursor()
        self.num_tokens = self.num_documents = 0
        self._hash = hashlib.sha256()
        self._checks: list[int] = []
        self._shard: _ShardFiles | None = None
        self._skip = 0  # tokens of the document at hand that an earlier shard holds
        self._document_bytes = self._document_token_bytes = 0

    def resume(self) -> None:
        """Take over the whole shards that are there; the first damaged one and all after it are removed."""
        for number in shard_numbers(self._folder):
            shard = self._usable(number)
            if shard is None:
                _remove_shards(self._folder, number)
                break
            self._hash.update(shard.file.content[HEADER_BYTES:].data)
            self._checks.append(shard.index.crc32)
            self.num_tokens += shard.index.num_tokens
            self.num_documents += shard.index.num_documents
            self.cursor = shard.index.end
        self._skip, self.cursor = self.cursor.offset, replace(self.cursor, offset=0)

    def _usable(self, number: int) -> Shard | None:
        if number != len(self._checks):
            return None
        try:
            shard = open_shard(shard_folder(self._folder, number), number)
            shard.file.check()
        except DataError:
            return None
        # A shorter one is the last of a run that ended before the index was written: make it anew.
        whole = shard.index.num_tokens == self._plan.shard_tokens and shard.index.dtype == self._plan.dtype
        return shard if whole else None

    def add(self, part: Part) -> None:
        """Append a part of a document."""
        tokens = part.tokens
        self._document_bytes += part.num_bytes
        self._document_token_bytes += int(self._tokenizer.token_bytes[tokens].sum())
        self._append(tokens)
        if not part.last:
            return
        if self.cursor.offset:  # a tokenizer may drop a whole document
            self._append(self._ending)
        self.cursor = Cursor(
            documents=self.cursor.documents + 1,
            num_bytes=self.cursor.num_bytes + self._document_bytes,
            token_bytes=self.cursor.token_bytes + self._document_token_bytes,
        )
        self._document_bytes = self._document_token_bytes = 0

    def _append(self, tokens: TokenArray) -> None:
        if self._skip:
            known = min(self._skip, len(tokens))
            self._skip -= known
            self.cursor = replace(self.cursor, offset=self.cursor.offset + known)
            tokens = tokens[known:]
        while len(tokens):
            # Closed when the next token comes, so that where a shard ends does not depend on the parts.
            if self._shard is not None and self._shard.num_tokens == self._plan.shard_tokens:
                self._close_shard()
            if self._shard is None:
                self._shard = _ShardFiles(self._folder, len(self._checks), self._plan.dtype)
            if self.cursor.offset == 0:
                self._shard.starts.append(self._shard.num_tokens)
                self.num_documents += 1
            piece = tokens[: self._plan.shard_tokens - self._shard.num_tokens]
            data = piece.tobytes()
            self._hash.update(data)
            self._shard.write(data, len(piece))
            self.num_tokens += len(piece)
            self.cursor = replace(self.cursor, offset=self.cursor.offset + len(piece))
            tokens = tokens[len(piece) :]

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._checks.append(self._shard.finish(self.cursor))
            self._shard = None

    def finish(self) -> Written:
        """Close the last shard."""
        if self._skip:
            raise DataError(
                f"{self._plan.source} ends {self._skip} tokens before the last whole shard of "
                f"{self._folder} does; delete that folder to have the text tokenised from the start"
            )
        self._close_shard()
        return Written(
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            end=self.cursor,
            sha256=self._hash.hexdigest(),
            shards=tuple(self._checks),
        )

    def abandon(self) -> None:
        """Remove the shard at hand, and the whole folder where nothing in it can be continued."""
        if self._shard is not None:
            self._shard.remove()
        # What is on disk counts: the last shard may have been put in place just before.
        with suppress(OSError):
            if not shard_numbers(self._folder):
                shutil.rmtree(self._folder)


class _ShardFiles:
    """A shard while it is written."""

    def __init__(self, store: Path, number: int, dtype: str) -> None:
        self._store, self._number, self._dtype = store, number, dtype
        self._folder = temporary_path(store, f"{number:05d}")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._file: IO[bytes] = (self._folder / "tokens.npy").open("wb")  # noqa: SIM115 (closed in finish)
        self._file.write(bytes(HEADER_BYTES))
        self._checks = RunningChecksums(HEADER_BYTES)
        self.num_tokens = 0
        self.starts: list[int] = []

    def write(self, data: bytes, count: int) -> None:
        self._file.write(data)
        self._checks.update(data)
        self.num_tokens += count

    def finish(self, end: Cursor) -> int:
        """Put the shard in place; the checksum of its index."""
        header = npy_header(np.dtype(self._dtype), self.num_tokens)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        starts = self._folder / "starts.npy"
        begins = np.array(self.starts, dtype=np.int64)
        write_bytes(starts, npy_header(begins.dtype, len(begins)) + begins.tobytes())
        index = ShardIndex(
            format_version=FORMAT_VERSION,
            number=self._number,
            dtype=self._dtype,
            num_tokens=self.num_tokens,
            num_documents=len(begins),
            end=end,
            tokens_crc32=tuple(self._checks.finish(header)),
            starts_crc32=tuple(checksums(starts)),
        )
        index = replace(index, crc32=index.checksum())
        write_json(self._folder / "index.json", asdict(index))
        sync_folder(self._folder)
        place = shard_folder(self._store, self._number)
        try:
            self._folder.rename(place)
        except OSError:
            # Another machine on a file system without locks was faster; its shard must be the same.
            if not place.exists() or open_shard(place, self._number).index != index:
                raise
            self.remove()
        sync_folder(self._store)
        return index.crc32

    def remove(self) -> None:
        with suppress(OSError):
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove_shards(folder: Path, first: int) -> None:
    for number in reversed([n for n in shard_numbers(folder) if n >= first]):
        shutil.rmtree(shard_folder(folder, number))


def _remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left. On this machine the lock says that nobody else writes here."""
    for path in sorted(folder.glob(f"{WRITING}*")):
        with suppress(FileNotFoundError):
            if path.name.startswith(f"{WRITING}{host()}-") or time.time() - path.stat().st_mtime > _OLD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def discard(folder: Path) -> None:
    """Remove a store: its index first, so that no part of it is ever taken for the whole."""
    with suppress(FileNotFoundError):
        (folder / "index.json").unlink()
    shutil.rmtree(folder, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove the plan of a store that is complete."""
    plan = folder / PLAN
    with suppress(OSError):
        if plan.exists():
            plan.unlink()


def same(index: Any, plan: Plan) -> bool:
    """Whether an index (of :class:`spikelm.data.store.Index`) is that of the planned store."""
    return (index.fingerprint, index.tokenizer, index.eos_id, index.dtype) == plan.content
