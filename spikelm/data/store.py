"""Tokens on disk: a source tokenised once into memory-mapped shards, with an index beside them.

A store is a folder of shards (see :mod:`spikelm.data.shards`) and ``index.json``, which is written last: a
store that has one is whole. What may befall it later is found by checksums: every index carries its own and
those of the arrays, compared when the store is opened, and of tokens beyond ``CHECKED_AT_OPEN`` bytes when
they are first read. Where the tokenizer has an end-of-document token, it follows every document.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spikelm.data import writing
from spikelm.data.durable import replace_json
from spikelm.data.lock import locked
from spikelm.data.shards import (
    FORMAT_VERSION,
    HEADER_BYTES,
    ShardedTokens,
    check_tokens,
    checksum_of,
    open_shard,
    read_checked_json,
    shard_folder,
)
from spikelm.data.source import Source, TokenSource
from spikelm.errors import DataError
from spikelm.tokenizer import TokenArray, Tokenizer

__all__ = ["FORMAT_VERSION", "Index", "TokenStore", "check_tokens", "open_store", "tokenise", "tokenise_into"]

CHECKED_AT_OPEN = 1 << 28
"""Tokens of at most this many bytes are checked as a whole when a store is opened (about 0.15 s)."""
DAMAGED = "delete its folder to have the text tokenised again"


@dataclass(frozen=True, kw_only=True)
class Index:
    """What ``index.json`` records.

    Attributes:
        format_version: version of this layout.
        source: specification of the source.
        tokenizer: sha256 of the tokenizer.
        vocab_size: ids of the tokenizer.
        eos_id: token that ends every document, or None.
        dtype: of the tokens: ``uint16`` or ``uint32``.
        num_tokens, num_documents: counts, the end-of-document tokens included.
        num_bytes: UTF-8 bytes of the documents.
        byte_exact: whether the tokens' byte lengths add up to ``num_bytes``.
        tokens_sha256: hash of all tokens, the same however they are cut into shards.
        fingerprint: sha256 of the source's fingerprint; empty for a store in memory.
        shard_tokens: tokens of every shard but the last; 0 for a store in memory.
        shards: checksum of the index of every shard.
        crc32: checksum of all the above.
    """

    format_version: int
    source: str
    tokenizer: str
    vocab_size: int
    eos_id: int | None
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    byte_exact: bool
    tokens_sha256: str
    fingerprint: str = ""
    shard_tokens: int = 0
    shards: tuple[int, ...] = ()
    crc32: int = 0

    def checksum(self) -> int:
        """What :attr:`crc32` must be."""
        return checksum_of(asdict(replace(self, crc32=0)))


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """A source as tokens.

    Attributes:
        tokens: ids, 1-D: a read-only memory map, or :class:`ShardedTokens` where there are several shards.
        starts: int64, position of the first token of every document, increasing from 0.
        index: counts and hashes.
        path: folder on disk, or None for a store in memory.
        files: the files the tokens are in, or None for a store in memory.
    """

    tokens: TokenArray | ShardedTokens
    starts: npt.NDArray[np.int64]
    index: Index
    path: Path | None = None
    files: ShardedTokens | None = None

    def read(self, begin: int, end: int) -> TokenArray:
        """Tokens from ``begin`` to ``end``, checked if these were not yet.

        Raises:
            DataError: they are not what was written.
        """
        if self.files is not None:
            return self.files.read(begin, end)
        tokens: TokenArray = self.tokens[begin:end]
        return tokens

    @property
    def where(self) -> str:
        """What to call the tokens in a message."""
        return str(self.path) if self.path else "the tokens in memory"

    def verify(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Read everything and compare with the index.

        Args:
            on_progress: called with the number of tokens done.

        Raises:
            DataError: a token is outside the vocabulary or a file is not the one that was written.
        """
        if self.files is None:
            check_tokens(np.asarray(self.tokens), self.index.vocab_size, self.where)
            return
        self.files.verify(self.index.vocab_size, on_progress)
        digest = hashlib.sha256()
        for array in self.files.arrays():
            digest.update(array.view(np.uint8).data)
        if digest.hexdigest() != self.index.tokens_sha256:
            raise DataError(
                f"{self.where} is damaged: the hash of its tokens is not that of its index; {DAMAGED}"
            )


def default_cache_dir() -> Path:
    """``$SPIKELM_CACHE/tokens``, or ``spikelm/tokens`` in the user's cache folder."""
    if named := os.environ.get("SPIKELM_CACHE"):
        return Path(named) / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikelm" / "tokens"


def tokenise(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
    *,
    workers: int = 0,
    shard_tokens: int = writing.SHARD_TOKENS,
) -> TokenStore:
    """The tokens of ``source``, from the cache where they are already there.

    Several processes may ask for the same tokens at once: one makes them and the others wait. A run that was
    interrupted is continued after its last whole shard, and gives the same bytes as one that was not.

    Args:
        source: documents, or tokens already (which are opened where they are).
        tokenizer: how to encode them.
        cache_dir: where stores are kept; :func:`default_cache_dir` unless given.
        on_progress: called with the number of UTF-8 bytes done after every part of a document.
        workers: processes that tokenise; 0 for one per core. Little text is tokenised without any.
        shard_tokens: tokens of a shard; an unfinished or finished store keeps the size it has.

    Raises:
        DataError: the source is damaged or empty, or the cache cannot be written.
    """
    cache_dir = cache_dir or default_cache_dir()
    if isinstance(source, TokenSource):
        return source.open_tokens(tokenizer, cache_dir, on_progress)
    plan = writing.Plan.of(source, tokenizer, shard_tokens)
    identity = json.dumps(plan.content)
    folder = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:32]
    complete = (folder / "index.json").exists
    try:
        while True:
            store = _found(folder, source)
            if store is not None:
                return store
            cache_dir.mkdir(parents=True, exist_ok=True)
            # A damaged store must be replaced, so its index says nothing about the work of another process.
            done = None if complete() else complete
            with locked(folder, f"tokenising {source.name}", done) as held:
                if not held:
                    continue
                store = _found(folder, source)  # by a process that was faster
                if store is not None:
                    return store
                if complete():
                    writing.discard(folder)  # damaged
                started = writing.read_plan(folder)
                if started is not None and started.content == plan.content:
                    plan = replace(started, source=source.name)
                    replace_json(folder / writing.PLAN, asdict(plan))
                return _write(folder, plan, source, tokenizer, workers, on_progress)
    except OSError as error:
        raise DataError(f"cannot write the token cache {cache_dir}: {error.strerror or error}") from error


def tokenise_into(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    on_progress: Callable[[int], None] | None = None,
    *,
    workers: int = 0,
    shard_tokens: int = writing.SHARD_TOKENS,
) -> TokenStore:
    """Like :func:`tokenise`, into a folder of the caller's choice.

    Raises:
        DataError: also if the folder holds anything but a store of this source and tokenizer.
    """
    if isinstance(source, TokenSource):
        raise DataError(f"{source.name} holds tokens already; name it as it is, or give text")
    plan = writing.Plan.of(source, tokenizer, shard_tokens)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"tokenising {source.name}"):
            if (folder / "index.json").exists():
                store = open_store(folder)
                if not writing.same(store.index, plan):
                    raise DataError(
                        f"{folder} already holds {store.index.source} in another state or of another "
                        f"tokenizer ({store.index.tokenizer[:12]}); give another folder or delete it"
                    )
                return store
            started = writing.read_plan(folder)
            if started is None and folder.exists() and any(folder.iterdir()):
                raise DataError(f"{folder} is not empty and holds no token store; give a new folder")
            if started is not None and replace(started, source=plan.source) != plan:
                raise DataError(
                    f"{folder} holds an unfinished store of {started.source} with shards of "
                    f"{started.shard_tokens} tokens that this command would not continue (another source, "
                    "tokenizer or shard size); give the same command as before, or delete it"
                )
            return _write(folder, started or plan, source, tokenizer, workers, on_progress)
    except OSError as error:
        raise DataError(f"cannot write the token store {folder}: {error.strerror or error}") from error


def open_store(folder: Path) -> TokenStore:
    """Open a store written by :func:`tokenise`.

    Raises:
        DataError: a file is missing, short, of another type, or does not fit the index.
    """
    index = _read_index(folder / "index.json")
    shards = [_open_shard(folder, number, index) for number in range(len(index.shards))]
    counts = [shard.index.num_tokens for shard in shards]
    bounds = np.cumsum([0, *counts], dtype=np.int64)
    starts = np.concatenate([s.starts + begin for s, begin in zip(shards, bounds, strict=False)])
    if sum(counts) != index.num_tokens or len(starts) != index.num_documents or starts[0] != 0:
        raise DataError(
            f"{folder} is damaged: its shards hold {sum(counts)} tokens in {len(starts)} documents and its "
            f"index describes {index.num_tokens} in {index.num_documents}"
        )
    files = ShardedTokens([shard.file for shard in shards], counts, index.dtype, HEADER_BYTES, DAMAGED)
    whole = index.num_tokens * np.dtype(index.dtype).itemsize <= CHECKED_AT_OPEN
    for shard in shards:
        shard.file.check(0, None if whole else HEADER_BYTES)
    return TokenStore(tokens=files.whole, starts=starts, index=index, path=folder, files=files)


def _open_shard(folder: Path, number: int, index: Index) -> Any:
    path = shard_folder(folder, number)
    if not path.exists():
        raise DataError(
            f"{path} is missing: shard {number} of {len(index.shards)}; copy it again, or {DAMAGED}"
        )
    shard = open_shard(path, number)
    if shard.index.crc32 != index.shards[number] or shard.index.dtype != index.dtype:
        raise DataError(f"{path} is a shard of another store than {folder / 'index.json'}; {DAMAGED}")
    return shard


def _found(folder: Path, source: Source) -> TokenStore | None:
    """The complete store in ``folder``; None, with a warning where it is damaged, if it must be made."""
    if not (folder / "index.json").exists():
        return None
    try:
        store = open_store(folder)
        writing.tidy(folder)  # what a process left that was killed just before
        return store
    except DataError as error:
        warnings.warn(f"{error} (tokenising {source.name} again)", stacklevel=3)
        return None


def _write(
    folder: Path,
    plan: writing.Plan,
    source: Source,
    tokenizer: Tokenizer,
    workers: int,
    on_progress: Callable[[int], None] | None,
) -> TokenStore:
    written = writing.write_shards(folder, plan, source, tokenizer, workers, on_progress)
    if writing.Plan.of(source, tokenizer, plan.shard_tokens).content != plan.content:
        writing.discard(folder)
        raise DataError(f"{source.name} changed while it was tokenised; give the command again")
    index = Index(
        format_version=FORMAT_VERSION,
        source=plan.source,
        tokenizer=plan.tokenizer,
        vocab_size=plan.vocab_size,
        eos_id=plan.eos_id,
        dtype=plan.dtype,
        num_tokens=written.num_tokens,
        num_documents=written.num_documents,
        num_bytes=written.end.num_bytes,
        byte_exact=written.end.token_bytes == written.end.num_bytes,
        tokens_sha256=written.sha256,
        fingerprint=plan.fingerprint,
        shard_tokens=plan.shard_tokens,
        shards=written.shards,
    )
    replace_json(folder / "index.json", asdict(replace(index, crc32=index.checksum())))
    writing.tidy(folder)
    return open_store(folder)


def _read_index(path: Path) -> Index:
    content = read_checked_json(path, "token store", {field.name for field in fields(Index)})
    index = Index(**content)
    # The checksum first: an index that has not changed needs no doubt about the type of each value.
    if index.crc32 != index.checksum():
        raise DataError(f"{path} is damaged: its checksum is not the one that was written")
    if index.num_documents < 1 or index.num_tokens < 1 or not index.shards:
        raise DataError(
            f"{path} describes {index.num_tokens} tokens in {index.num_documents} documents; "
            f"expected at least one of each"
        )
    return index
