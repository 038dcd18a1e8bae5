"""One process at a time per folder, on one machine and, where the file system can, on many.

The lock is ``flock`` on a file beside the folder, so it ends with its process however that ends. On file
systems without it (some network mounts) the lock is taken in this machine's temporary folder instead: then
two machines may do the same work, which is safe wherever results are put in place whole and equal.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_log = logging.getLogger(__name__)
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5  # seconds between two looks at a lock that another process holds
_SILENT = 2.0  # seconds of waiting that are not worth a word


@contextmanager
def locked(folder: Path, what: str, done: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Hold the lock of ``folder``, waiting for it if need be.

    Args:
        folder: what is locked; it need not exist, its parent must.
        what: what the holder does, for the line that a waiting process logs.
        done: whether the holder's work is there, so that many who wait for it need not take turns.

    Yields:
        Whether the lock is held; false only once ``done`` says so.

    Raises:
        OSError: the lock file cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    try:
        handle = _acquire(path, what, done)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        path = local_lock(folder)
        _log.info("%s has no file locks (%s); locking on this machine only", folder.parent, error.strerror)
        handle = _acquire(path, what, done)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        # Removed while it is held: whoever waits for it sees that the name is gone and makes a new file.
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def local_lock(folder: Path) -> Path:
    """Lock file of ``folder`` on this machine alone."""
    digest = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"spikelm-{os.getuid()}-{digest}.lock"


def _acquire(path: Path, what: str, done: Callable[[], bool] | None) -> int | None:
    started, pause, spoke = time.monotonic(), _FIRST_PAUSE, False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 1000, 0)
            os.close(handle)
            if not spoke and time.monotonic() - started > _SILENT:
                spoke = True
                _log.warning("waiting for %s, which is %s", _describe(holder), what)
            time.sleep(pause)
            if done is not None and done():
                return None
            pause = min(2 * pause, _LONGEST_PAUSE)
            continue
        except BaseException:
            os.close(handle)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
                os.ftruncate(handle, 0)
                os.pwrite(handle, note.encode(), 0)
                return handle
        os.close(handle)  # the file that was locked is no longer the one of that name


def _describe(note: bytes) -> str:
    try:
        holder = json.loads(note)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
