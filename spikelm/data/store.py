"""Tokens on disk: a source tokenised once into a memory-mapped array, with an index beside it.

A store is a folder: ``tokens.npy`` (1-D, uint16 where the vocabulary has at most 65,536 ids, else uint32),
``starts.npy`` (int64, where each document begins) and ``index.json``. It is written beside its place and
renamed into it once complete and on disk, so a store that exists is whole. What may befall it later is found
by checksums: the index carries its own and those of both arrays, compared when the store is opened, and of
tokens beyond ``CHECKED_AT_OPEN`` bytes when they are first read. Where the tokenizer has an end-of-document
token, it follows every document.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spikelm.data.checksums import CheckedFile, checksums
from spikelm.data.source import Source
from spikelm.errors import DataError
from spikelm.tokenizer import TokenArray, Tokenizer

FORMAT_VERSION = 2
CHECKED_AT_OPEN = 1 << 28
"""Tokens of at most this many bytes are checked as a whole when a store is opened (about 0.15 s)."""
_HEADER_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class Index:
    """What ``index.json`` records.

    Attributes:
        format_version: version of this layout.
        source: specification of the source.
        tokenizer: sha256 of the tokenizer.
        vocab_size: ids of the tokenizer.
        eos_id: token that ends every document, or None.
        dtype: ``uint16`` or ``uint32``.
        num_tokens, num_documents: counts, the end-of-document tokens included.
        num_bytes: UTF-8 bytes of the documents.
        byte_exact: whether the tokens' byte lengths add up to ``num_bytes``.
        tokens_sha256: hash of ``tokens.npy``, or of the tokens for a store in memory.
        tokens_crc32, starts_crc32: checksums of the chunks of both files.
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
    tokens_crc32: tuple[int, ...] = ()
    starts_crc32: tuple[int, ...] = ()
    crc32: int = 0

    def checksum(self) -> int:
        """What :attr:`crc32` must be."""
        content = asdict(replace(self, crc32=0))
        return zlib.crc32(json.dumps(content, sort_keys=True).encode("ascii"))


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """A source as tokens.

    Attributes:
        tokens: ids, 1-D, usually a read-only memory map.
        starts: int64, position of the first token of every document, increasing from 0.
        index: counts and hashes.
        path: folder on disk, or None for a store in memory.
        file: the file the tokens are in, or None for a store in memory.
    """

    tokens: TokenArray
    starts: npt.NDArray[np.int64]
    index: Index
    path: Path | None = None
    file: CheckedFile | None = None

    def read(self, begin: int, end: int) -> TokenArray:
        """Tokens from ``begin`` to ``end``, checked if these were not yet.

        Raises:
            DataError: they are not what was written.
        """
        if self.file is not None:
            size = self.tokens.itemsize
            try:
                self.file.check(
                    _HEADER_BYTES + begin * size, _HEADER_BYTES + min(end, len(self.tokens)) * size
                )
            except DataError as error:
                raise DataError(f"{error}; delete its folder to have the text tokenised again") from error
        return self.tokens[begin:end]

    @property
    def where(self) -> str:
        """What to call the tokens in a message."""
        return str(self.path / "tokens.npy") if self.path else "the tokens in memory"

    def verify(self) -> None:
        """Read everything and compare with the index.

        Raises:
            DataError: a token is outside the vocabulary or the file is not the one that was written.
        """
        if self.file is not None:
            self.file.check()
        check_tokens(self.tokens, self.index.vocab_size, self.where)


def check_tokens(tokens: npt.NDArray[Any], vocab_size: int, where: str, offset: int = 0) -> None:
    """Refuse a token outside the vocabulary, naming where and its position (``offset`` is added)."""
    bad = np.flatnonzero(np.asarray(tokens) >= vocab_size)
    if bad.size:
        position = int(bad[0])
        raise DataError(
            f"{where}: token {int(tokens[position])} at position {offset + position} is outside the "
            f"vocabulary of {vocab_size}; was it written with another tokenizer, or damaged?"
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
) -> TokenStore:
    """The tokens of ``source``, from the cache where they are already there.

    Args:
        source: documents.
        tokenizer: how to encode them.
        cache_dir: where stores are kept; :func:`default_cache_dir` unless given.
        on_progress: called with the number of UTF-8 bytes done after every document.

    Raises:
        DataError: the source is damaged or empty, or the cache cannot be written.
    """
    cache_dir = cache_dir or default_cache_dir()
    identity = json.dumps([FORMAT_VERSION, source.fingerprint(), tokenizer.sha256, tokenizer.eos_id])
    folder = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if folder.exists():
        try:
            return open_store(folder)
        except DataError as error:
            warnings.warn(f"{error} (tokenising {source.name} again)", stacklevel=2)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=cache_dir))
        try:
            _write(temporary, source, tokenizer, on_progress)
            _move_into_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write the token cache {cache_dir}: {error.strerror or error}") from error
    return open_store(folder)


def open_store(folder: Path) -> TokenStore:
    """Open a store written by :func:`tokenise`.

    Raises:
        DataError: a file is missing, short, of another type, or does not fit the index.
    """
    index = _read_index(folder / "index.json")
    token_file = _open_array(folder / "tokens.npy", index.dtype, index.num_tokens, index.tokens_crc32)
    start_file = _open_array(folder / "starts.npy", "int64", index.num_documents, index.starts_crc32)
    start_file.check()
    token_file.check(0, None if len(token_file.content) <= CHECKED_AT_OPEN else _HEADER_BYTES)
    starts = np.array(start_file.content[_HEADER_BYTES:].view(np.int64))
    if starts[0] != 0 or starts[-1] >= index.num_tokens or not (np.diff(starts) > 0).all():
        raise DataError(f"{folder / 'starts.npy'} is damaged: document starts must increase from 0")
    tokens = token_file.content[_HEADER_BYTES:].view(index.dtype)
    return TokenStore(tokens=tokens, starts=starts, index=index, path=folder, file=token_file)


def _write(
    folder: Path, source: Source, tokenizer: Tokenizer, on_progress: Callable[[int], None] | None
) -> None:
    num_bytes = token_bytes = num_tokens = 0
    starts: list[int] = []
    pending: deque[int] = deque()  # bytes of the documents handed to the tokenizer

    def measured() -> Iterator[str]:
        for text in source.documents():
            pending.append(len(text.encode("utf-8", errors="surrogatepass")))
            yield text

    ending = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=tokenizer.dtype)
    with (folder / "tokens.npy").open("w+b") as file:
        file.write(bytes(_HEADER_BYTES))
        for ids in tokenizer.encode_arrays(measured()):
            num_bytes += pending.popleft()
            if not len(ids):  # a tokenizer may drop what it does not know
                continue
            starts.append(num_tokens)
            file.write(ids.tobytes())
            file.write(ending.tobytes())
            num_tokens += len(ids) + len(ending)
            token_bytes += int(tokenizer.token_bytes[ids].sum())
            if on_progress is not None:
                on_progress(num_bytes)
        file.seek(0)
        file.write(_npy_header(tokenizer.dtype, num_tokens))
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not starts:
        raise DataError(f"{source.name} gives no tokens with {tokenizer!r}")
    with (folder / "starts.npy").open("wb") as starts_file:
        starts_file.write(_npy_header(np.dtype(np.int64), len(starts)))
        starts_file.write(np.array(starts, dtype=np.int64).tobytes())
        starts_file.flush()
        os.fsync(starts_file.fileno())
    index = Index(
        format_version=FORMAT_VERSION,
        source=source.name,
        tokenizer=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=tokenizer.dtype.name,
        num_tokens=num_tokens,
        num_documents=len(starts),
        num_bytes=num_bytes,
        byte_exact=token_bytes == num_bytes,
        tokens_sha256=digest,
        tokens_crc32=tuple(checksums(folder / "tokens.npy")),
        starts_crc32=tuple(checksums(folder / "starts.npy")),
    )
    index = replace(index, crc32=index.checksum())
    with (folder / "index.json").open("w", encoding="utf-8") as text_file:
        json.dump(asdict(index), text_file, indent=2)
        text_file.flush()
        os.fsync(text_file.fileno())


def _npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """Header of a 1-D .npy file (format 1.0) that always takes the same number of bytes."""
    text = f"{{'descr': '{dtype.newbyteorder('<').str}', 'fortran_order': False, 'shape': ({count},), }}"
    room = _HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Rename, unless another process was faster; a damaged store in the way is removed."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        try:
            open_store(folder)
        except DataError:
            shutil.rmtree(folder)
            temporary.rename(folder)
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder.parent, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_index(path: Path) -> Index:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} is no token store: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not describe a token store of format {FORMAT_VERSION}")
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path} has format {content.get('format_version')}; expected {FORMAT_VERSION}")
    if set(content) != {field.name for field in fields(Index)}:
        raise DataError(f"{path} does not describe a token store of format {FORMAT_VERSION}")
    content |= {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    index = Index(**content)
    # The checksum first: an index that has not changed needs no doubt about the type of each value.
    if index.crc32 != index.checksum():
        raise DataError(f"{path} is damaged: its checksum is not the one that was written")
    if index.num_documents < 1 or index.num_tokens < 1:
        raise DataError(
            f"{path} describes {index.num_tokens} tokens in {index.num_documents} documents; "
            f"expected at least one of each"
        )
    return index


def _open_array(path: Path, dtype: str, count: int, expected: tuple[int, ...]) -> CheckedFile:
    return CheckedFile(path, _HEADER_BYTES + count * np.dtype(dtype).itemsize, expected)
