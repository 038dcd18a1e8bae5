"""Small file operations that survive a kill at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Size and checksum by which a written file is known again.

    Attributes:
        bytes: its size.
        sha256: hexadecimal SHA-256 of its bytes.
    """

    bytes: int
    sha256: str


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the contents of a written file durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def point_at(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, replacing an older one in one step."""
    temporary = link.with_name(f".{link.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)
    sync_folder(link.parent)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(path: Path) -> Seal:
    """Make a written file durable and read its size and checksum."""
    sync_file(path)
    return Seal(bytes=path.stat().st_size, sha256=sha256(path))


def why(error: BaseException) -> str:
    """The reason of an operating system error without its number and path."""
    return getattr(error, "strerror", None) or str(error)
