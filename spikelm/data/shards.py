"""Shards of a token store: folders of a fixed number of tokens, each written whole and checked by itself.

A shard is a folder named by its number, ``00000``: ``tokens.npy`` (1-D), ``starts.npy`` (int64, where in the
shard documents begin; a document may run on from the shard before) and ``index.json`` with the checksums of
both, its own, and the point in the source that the shard ends at, from which an interrupted run goes on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, SupportsIndex, cast

import numpy as np
import numpy.typing as npt

from spikelm.data.checksums import CheckedFile
from spikelm.errors import DataError
from spikelm.tokenizer import TokenArray

FORMAT_VERSION = 3
HEADER_BYTES = 128
"""Size of the header of every .npy file of a store, so that a token's place is known from its position."""
_STRIDE = 1 << 22  # tokens looked at together


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A point in a source.

    Attributes:
        documents: documents of the source that lie before it as a whole, those without tokens included.
        offset: tokens of the next document that lie before it.
        num_bytes, token_bytes: UTF-8 bytes of those whole documents, and what their tokens stand for.
    """

    documents: int = 0
    offset: int = 0
    num_bytes: int = 0
    token_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a shard's ``index.json`` records.

    Attributes:
        format_version: version of this layout.
        number: which shard it is, from 0.
        dtype: ``uint16`` or ``uint32``.
        num_tokens, num_documents: tokens in it, and documents that begin in it.
        end: where in the source it ends.
        tokens_crc32, starts_crc32: checksums of the chunks of both files.
        crc32: checksum of all the above.
    """

    format_version: int
    number: int
    dtype: str
    num_tokens: int
    num_documents: int
    end: Cursor
    tokens_crc32: tuple[int, ...]
    starts_crc32: tuple[int, ...]
    crc32: int = 0

    def checksum(self) -> int:
        """What :attr:`crc32` must be."""
        return checksum_of(asdict(replace(self, crc32=0)))


def checksum_of(content: dict[str, Any]) -> int:
    """CRC-32 of JSON values."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode("ascii"))


def shard_folder(store: Path, number: int) -> Path:
    """Where shard ``number`` of a store is."""
    return store / f"{number:05d}"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An open shard.

    Attributes:
        index: counts and checksums.
        file: its tokens, memory-mapped.
        starts: int64, positions in the shard where documents begin.
    """

    index: ShardIndex
    file: CheckedFile
    starts: npt.NDArray[np.int64]


def open_shard(folder: Path, number: int) -> Shard:
    """Open a shard; its document starts are checked, its tokens are not yet.

    Raises:
        DataError: a file is missing, short, damaged or of another shard.
    """
    index = _read_index(folder / "index.json", number)
    file = _open_array(folder / "tokens.npy", index.dtype, index.num_tokens, index.tokens_crc32)
    start_file = _open_array(folder / "starts.npy", "int64", index.num_documents, index.starts_crc32)
    start_file.check()
    starts = np.array(start_file.content[HEADER_BYTES:].view(np.int64))
    check_starts(starts, index.num_tokens, folder / "starts.npy", HEADER_BYTES)
    return Shard(index=index, file=file, starts=starts)


def check_starts(starts: npt.NDArray[np.int64], num_tokens: int, path: Path, first_byte: int) -> None:
    """Refuse document starts that do not increase or lie outside the tokens, naming the first bad one."""
    bad = (starts < 0) | (starts >= num_tokens)
    bad[1:] |= np.diff(starts) <= 0
    if bad.any():
        where = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{path} is damaged at byte {first_byte + 8 * where}: document {where} begins at token "
            f"{int(starts[where])}; document starts must increase and stay below {num_tokens}"
        )


def check_tokens(
    tokens: npt.NDArray[Any], vocab_size: int, where: str, offset: int = 0, first_byte: int | None = None
) -> None:
    """Refuse a token outside the vocabulary, naming where and its position.

    Args:
        tokens: ids, 1-D.
        vocab_size: they must be from 0 to below this.
        where: file or source, for the message.
        offset: position of the first of ``tokens``.
        first_byte: where in the file position 0 is; the byte is named too if given.
    """
    array = np.asarray(tokens)
    if not array.size or (array.max() < vocab_size and array.min() >= 0):
        return
    found = int(np.flatnonzero((array >= vocab_size) | (array < 0))[0])
    byte = "" if first_byte is None else f" (byte {first_byte + (offset + found) * array.itemsize})"
    raise DataError(
        f"{where}: token {int(array[found])} at position {offset + found}{byte} is outside the "
        f"vocabulary of {vocab_size}; was it written with another tokenizer, or damaged?"
    )


def npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """Header of a 1-D .npy file (format 1.0) that always takes the same number of bytes."""
    text = f"{{'descr': '{dtype.newbyteorder('<').str}', 'fortran_order': False, 'shape': ({count},), }}"
    room = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"


def read_checked_json(path: Path, what: str, keys: set[str]) -> dict[str, Any]:
    """An index file of this format with exactly these keys; its checksum is the caller's to compare.

    Raises:
        DataError: it cannot be read, is of another format, or has other keys.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} is no {what}: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if isinstance(content, dict) and content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path} has format {content.get('format_version')}; expected {FORMAT_VERSION}")
    if not isinstance(content, dict) or set(content) != keys:
        raise DataError(f"{path} does not describe a {what} of format {FORMAT_VERSION}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


class ShardedTokens:
    """Tokens in several files, read as one array and checked when they are first read.

    A slice gives an array (a view of the memory map where it lies in one file), ``numpy.asarray`` all tokens.

    Args:
        files: the files in order, none without tokens.
        counts: tokens in each.
        dtype: of the tokens, the same in all.
        header: bytes before the tokens in each file.
        advice: what to do about damage; ends the message of an error.
    """

    def __init__(
        self, files: Sequence[CheckedFile], counts: Sequence[int], dtype: str, header: int, advice: str
    ) -> None:
        self.files, self.header, self.advice = tuple(files), header, advice
        self.dtype = np.dtype(dtype)
        self.bounds = np.cumsum([0, *counts], dtype=np.int64)
        self._arrays = [
            cast(TokenArray, file.content[header : header + count * self.dtype.itemsize].view(dtype))
            for file, count in zip(files, counts, strict=True)
        ]

    def read(self, begin: int, end: int) -> TokenArray:
        """Tokens from ``begin`` to ``end`` (clipped to what there is).

        Raises:
            DataError: a file does not hold what was written.
        """
        end = min(end, len(self))
        first = int(np.searchsorted(self.bounds, begin, side="right")) - 1
        pieces = []
        while begin < end:
            stop = min(end, int(self.bounds[first + 1]))
            pieces.append(self._piece(first, begin - int(self.bounds[first]), stop - int(self.bounds[first])))
            begin, first = stop, first + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _piece(self, number: int, begin: int, end: int) -> TokenArray:
        size = self.dtype.itemsize
        try:
            self.files[number].check(self.header + begin * size, self.header + end * size)
        except DataError as error:
            raise DataError(f"{error}; {self.advice}") from error
        return self._arrays[number][begin:end]

    def verify(self, vocab_size: int, on_progress: Callable[[int], None] | None = None) -> None:
        """Read all tokens: checksums, and that none is outside the vocabulary.

        Raises:
            DataError: naming the file, the position in it and the byte.
        """
        for file, array, begin in zip(self.files, self._arrays, self.bounds, strict=False):
            for at in range(0, len(array), _STRIDE):
                piece = array[at : at + _STRIDE]
                size = self.dtype.itemsize
                file.check(self.header + at * size, self.header + (at + len(piece)) * size)
                check_tokens(piece, vocab_size, str(file.path), at, self.header)
                if on_progress is not None:
                    on_progress(int(begin) + at + len(piece))
            file.check()

    @property
    def whole(self) -> TokenArray | ShardedTokens:
        """The memory map itself where there is one file, else this object."""
        return self._arrays[0] if len(self._arrays) == 1 else self

    def arrays(self) -> list[TokenArray]:
        """The tokens of each file as they are on disk, unchecked."""
        return list(self._arrays)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step == 1:
                return self.read(begin, end)
            places = range(begin, end, step)
            if not places:
                return np.empty(0, self.dtype)
            low, high = min(places[0], places[-1]), max(places[0], places[-1])
            return self.read(low, high + 1)[:: abs(step)][:: 1 if step > 0 else -1]
        place = range(len(self))[key]
        return self.read(place, place + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.read(0, len(self)), dtype=dtype)


def _read_index(path: Path, number: int) -> ShardIndex:
    content = read_checked_json(path, "shard of a token store", {f.name for f in fields(ShardIndex)})
    try:
        index = ShardIndex(**content | {"end": Cursor(**content["end"])})
    except TypeError as error:
        raise DataError(f"{path} does not describe a shard of format {FORMAT_VERSION}") from error
    # The checksum first: an index that has not changed needs no doubt about the type of each value.
    if index.crc32 != index.checksum():
        raise DataError(f"{path} is damaged: its checksum is not the one that was written")
    if index.number != number:
        raise DataError(f"{path} is of shard {index.number} where shard {number} was expected")
    return index


def _open_array(path: Path, dtype: str, count: int, expected: tuple[int, ...]) -> CheckedFile:
    return CheckedFile(path, HEADER_BYTES + count * np.dtype(dtype).itemsize, expected)
