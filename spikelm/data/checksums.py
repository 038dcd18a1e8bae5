"""Checksums of a file in chunks, so that a part of a large file is checked when it is first used."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spikelm.errors import DataError

CHUNK = 1 << 20
"""Bytes that share a checksum (CRC-32: more than 2 GB/s on one core)."""


def checksums(path: Path) -> list[int]:
    """CRC-32 of every chunk of a file, the last one possibly shorter."""
    with path.open("rb") as file:
        return [zlib.crc32(chunk) for chunk in iter(lambda: file.read(CHUNK), b"")]


class RunningChecksums:
    """The :func:`checksums` of a file while it is written, without reading it again.

    Args:
        header: bytes at the beginning that are known only at the end.
    """

    def __init__(self, header: int) -> None:
        self._header, self._chunk = header, CHUNK
        self._first = bytearray()  # the first chunk after the header waits for it
        self._done: list[int] = []
        self._running, self._size = 0, 0

    def update(self, data: bytes) -> None:
        """Count the next bytes of the file."""
        view = memoryview(data)
        if (room := self._chunk - self._header - len(self._first)) > 0:
            self._first += view[:room]
            view = view[room:]
        while len(view):
            piece = view[: self._chunk - self._size]
            self._running = zlib.crc32(piece, self._running)
            self._size += len(piece)
            view = view[len(piece) :]
            if self._size == self._chunk:
                self._done.append(self._running)
                self._running = self._size = 0

    def finish(self, header: bytes) -> list[int]:
        """The checksums of ``header`` and all bytes counted."""
        last = [self._running] if self._size else []
        return [zlib.crc32(header + self._first), *self._done, *last]


class CheckedFile:
    """A file as a read-only memory map whose bytes are compared with checksums before they are used.

    Args:
        path: the file.
        num_bytes: its size when it was written.
        expected: the :func:`checksums` of that time.

    Attributes:
        path: the file.
        content: its bytes, uint8.

    Raises:
        DataError: the file is missing or its size is another one.
    """

    def __init__(self, path: Path, num_bytes: int, expected: Sequence[int]) -> None:
        try:
            size = path.stat().st_size
            if size != num_bytes or len(expected) != -(-num_bytes // CHUNK):
                problem = "cut off" if size < num_bytes else "damaged"
                raise DataError(f"{path} is {problem} at byte {size}; {num_bytes} bytes were written")
            self.content = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        self.path, self._expected = path, expected
        self._checked = np.zeros(len(expected), dtype=bool)

    def check(self, begin: int = 0, end: int | None = None) -> None:
        """Check the bytes from ``begin`` to ``end`` (the end of the file unless given), once each.

        Raises:
            DataError: naming the file and where the first damaged chunk lies.
        """
        first, last = begin // CHUNK, -(-(len(self.content) if end is None else end) // CHUNK)
        for chunk in range(first, last):
            if self._checked[chunk]:
                continue
            at = chunk * CHUNK
            piece = self.content[at : at + CHUNK]
            if zlib.crc32(piece.data) != self._expected[chunk]:
                raise DataError(
                    f"{self.path} is damaged between byte {at} and byte {at + len(piece)}: "
                    f"their checksum is not the one that was written"
                )
            self._checked[chunk] = True
