"""Files and folders that are on disk before anything refers to them."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WRITING = ".writing-"
"""How the names of files and folders begin that are not yet whole."""


def temporary_path(folder: Path, what: str) -> Path:
    """A name in ``folder`` for what this process writes and renames; it tells machine and process."""
    return folder / f"{WRITING}{host()}-{os.getpid()}-{what}"


def host() -> str:
    """Name of this machine, as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a new file and, unless ``sync`` is off, wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any], sync: bool = True) -> None:
    """:func:`write_bytes` for JSON; equal content gives equal bytes."""
    write_bytes(path, json.dumps(content, indent=1, ensure_ascii=True).encode("ascii") + b"\n", sync)


def replace_json(path: Path, content: Mapping[str, Any], sync: bool = True) -> None:
    """Put a JSON file in place at once: a reader sees the old one or the new one, never a part.

    Args:
        path: the file.
        content: JSON values.
        sync: wait until it is on disk; off for what may be lost with the power, at the cost of work.
    """
    temporary = temporary_path(path.parent, path.name)
    write_json(temporary, content, sync)
    temporary.replace(path)
    if sync:
        sync_folder(path.parent)
