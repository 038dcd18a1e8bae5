"""Files named by a URL, read as a stream: http and https by Python itself, everything else by ``fsspec``.

A connection that breaks is taken up again where it broke, if the server can; what is still short is told.
"""

from __future__ import annotations

import http.client
import io
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO, Any

from spikelm.errors import DataError

TIMEOUT = 30.0
"""Seconds a server may be silent."""
_TRIES = 4  # attempts without a single new byte
_HTTP = ("http", "https")


class RemoteFile:
    """A file behind a URL.

    Attributes:
        url: where it is.
        name, suffix: last part of its path, and how that ends.

    Args:
        url: with a scheme, without a fragment.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        path = urllib.parse.urlsplit(url).path if self.is_http else url
        self.name = PurePosixPath(path).name
        self.suffix = PurePosixPath(path).suffix

    @property
    def is_http(self) -> bool:
        """Whether Python's own client reads it."""
        return self.url.partition("://")[0].lower() in _HTTP

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A stream of its bytes.

        Raises:
            DataError: it cannot be reached or is not there; also later, while it is read.
        """
        raw: io.RawIOBase = _HttpStream(self.url) if self.is_http else _FsspecStream(self.url)
        return io.BufferedReader(raw, buffer_size=1 << 20)

    def stamp(self) -> str:
        """What changes when the file does, as far as its server tells.

        Raises:
            DataError: it cannot be reached or is not there.
        """
        if self.is_http:
            headers = _http_headers(self.url)
            told = [headers.get(name) or "" for name in ("ETag", "Last-Modified", "Content-Length")]
            return f"{self.url}:{':'.join(told)}"
        system, path = file_system(self.url)
        return f"{self.url}:{_asked(self.url, lambda: system.ukey(path))}"

    def __str__(self) -> str:
        return self.url


def remote_glob(pattern: str) -> list[RemoteFile]:
    """The files that a URL with ``*``, ``?`` or ``[`` stands for, sorted.

    Raises:
        DataError: there are none, or the place cannot list its files.
    """
    if RemoteFile(pattern).is_http:
        raise DataError(f"{pattern}: web servers do not list their files; name each one")
    system, path = file_system(pattern)
    found = sorted(_asked(pattern, lambda: system.glob(path)))
    if not found:
        raise DataError(f"no file matches {pattern}")
    return [RemoteFile(str(system.unstrip_protocol(name))) for name in found]


def file_system(url: str) -> tuple[Any, str]:
    """The ``fsspec`` file system of a URL and the path in it.

    Raises:
        DataError: the scheme is unknown or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url} needs a package that is not installed: {_first_line(error)}") from error
    except ValueError as error:
        raise DataError(
            f"{url} cannot be opened: {_first_line(error)}; expected http, https, s3, gs, file, ..."
        ) from error
    return system, str(path)


def _asked(url: str, ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns; whatever a file system raises becomes one sentence."""
    try:
        return ask()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {url}; give the URL of an existing file") from error
    except Exception as error:  # each of the many file systems has errors of its own
        raise DataError(f"{url} cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _FsspecStream(io.RawIOBase):
    def __init__(self, url: str) -> None:
        system, path = file_system(url)
        self._url, self._done = url, 0
        self._file = _asked(url, lambda: system.open(path, "rb"))
        self._size = getattr(self._file, "size", None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _asked(f"{self._url} (byte {self._done})", lambda: self._file.read(len(buffer)))
        if not data and isinstance(self._size, int) and self._done < self._size:
            raise DataError(f"{self._url} is cut off at byte {self._done} of {self._size}")
        buffer[: len(data)] = data
        self._done += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _HttpStream(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self._url, self._done = url, 0
        self._response = _http_get(url)
        length = self._response.headers.get("Content-Length")
        self._size = int(length) if length and length.isdigit() else None
        self._tag = self._response.headers.get("ETag") or self._response.headers.get("Last-Modified")
        self._failures = 0
        self._broken = ""  # why the connection ended before its time

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            try:
                if not self._broken:
                    data = self._response.read(min(len(buffer), 1 << 20))
            except http.client.IncompleteRead as error:
                data, self._broken = error.partial, "the connection was closed"
            except (OSError, http.client.HTTPException) as error:
                self._broken = _first_line(error)
            if data:
                self._failures = 0
                break
            if self._size is not None and self._done < self._size:
                self._again(self._broken or "the connection was closed")
            elif self._broken:
                raise DataError(f"{self._url} is cut off at byte {self._done}: {self._broken}; try again")
            else:
                return 0
        buffer[: len(data)] = data
        self._done += len(data)
        return len(data)

    def _again(self, why: str) -> None:
        """Ask for the rest."""
        self._failures += 1
        problem = f"{self._url} is cut off at byte {self._done} of {self._size}: {why}"
        if self._tag is None or self._failures > _TRIES:
            raise DataError(f"{problem}; try again")
        self._response.close()
        rest = {"Range": f"bytes={self._done}-", "If-Range": self._tag}
        response = _http_get(self._url, rest)
        if response.status != 206:  # another file by now, or a server that cannot
            response.close()
            raise DataError(f"{problem}, and the server gives no rest of a file; try again")
        self._response, self._broken = response, ""

    def close(self) -> None:
        if not self.closed:
            self._response.close()
        super().close()


def _http_get(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    # No compression on the way: lengths and positions are those of the file.
    given = {"User-Agent": "spikelm", "Accept-Encoding": "identity"} | (headers or {})
    try:
        request = urllib.request.Request(url, headers=given, method=method)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise DataError(
                f"there is no file {url} (the server answers {error.code}); check the address"
            ) from error
        raise DataError(f"{url} cannot be read: the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise DataError(
            f"{url} cannot be reached: {reason}; is the address right and the network up?"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url} cannot be read: {_first_line(error)}") from error


def _http_headers(url: str) -> Any:
    try:
        with _http_get(url, method="HEAD") as response:
            return response.headers
    except DataError as error:
        cause = error.__cause__
        if not isinstance(cause, urllib.error.HTTPError) or cause.code not in (403, 405, 501):
            raise
    with _http_get(url) as response:  # a server that answers no HEAD
        return response.headers
