"""Reading files that may be compressed: plain, .xz, .gz or .zst, with damage reported in one sentence.

A leaf module (standard library and :mod:`spikelm.errors`), so that tokenizers and sources share it.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from spikelm.errors import DataError

if TYPE_CHECKING:
    from spikelm.data.remote import RemoteFile

    Place = Path | RemoteFile
    """Where a file is; what is read from it is checked in the same way."""

COMPRESSED_SUFFIXES = (".xz", ".gz", ".zst")


def plain_suffix(path: Place) -> str:
    """Suffix of the content in lower case: ``.txt`` for both ``a.txt`` and ``a.TXT.xz``."""
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


@contextmanager
def open_bytes(path: Place) -> Iterator[IO[bytes]]:
    """Open ``path`` for reading its uncompressed bytes.

    Raises:
        DataError: the file is missing, unreadable, truncated or corrupted, or zstandard is not installed.
    """
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            yield stack.enter_context(_uncompressed(path, raw))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; give the path of an existing file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder where a file was expected") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is truncated or corrupted ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_bytes(path: Place) -> bytes:
    """Whole uncompressed content of ``path``; raises :class:`DataError` like :func:`open_bytes`."""
    with open_bytes(path) as stream:
        return stream.read()


def decode_utf8(data: bytes, where: str, offset: int = 0) -> str:
    """Decode UTF-8, naming the first bad byte.

    Args:
        data: the bytes.
        where: what they are, for the message (a file, or a file and a line).
        offset: position of ``data`` in the uncompressed file, added to the reported offset.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not valid UTF-8"
            f"{' (it looks like UTF-16)' if utf16 else ''}; convert the file to UTF-8"
        ) from error


def is_compressed(path: Place) -> bool:
    """Whether :func:`open_bytes` uncompresses it."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def _uncompressed(path: Place, raw: IO[bytes]) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return lzma.open(raw, "rb")
    if suffix == ".gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return _open_zstandard(path, raw)
    return raw


def _open_zstandard(path: Place, file: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path} is compressed with zstandard, which is not installed; run `pip install zstandard`"
        ) from error
    raw = _ZstandardStream(file, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
    return io.BufferedReader(raw, buffer_size=1 << 18)


class _ZstandardStream(io.RawIOBase):
    """Raw stream over zstandard frames that reports a truncated frame (the library's own ends silently)."""

    def __init__(self, file: IO[bytes], new_frame: Callable[[], Any], library_error: type[Exception]) -> None:
        self._file, self._new_frame, self._library_error = file, new_frame, library_error
        self._frame: Any = None
        self._rest = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._rest or self._file.read(1 << 18)
            self._rest = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last zstandard frame is incomplete")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = self._frame.decompress(compressed)
            except self._library_error as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
