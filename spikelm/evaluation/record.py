"""What every result file of a measurement carries, so that somebody else can repeat it.

A record is plain JSON: what was asked (``kind``, ``arguments``), what it was asked of (checkpoint, data and
tokenizer, each with a SHA-256), where (machine, versions, revision, date), the seed, how many units were
measured, and what came out (``results``, the only part that a repetition must reproduce).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikelm.bench.record import machine
from spikelm.checkpoint import resolve_folder
from spikelm.errors import DataError

FORMAT = 1
"""Version of the layout; a reader refuses others."""
REQUIRED = ("format", "kind", "arguments", "results")
_CHUNK = 1 << 20


def stamp(
    kind: str,
    results: Mapping[str, Any],
    *,
    arguments: Mapping[str, Any],
    checkpoints: Mapping[str, Path],
    data: Mapping[str, Any] | None,
    tokenizer_sha256: str | None,
    seed: int | None,
    n: int | None,
) -> dict[str, Any]:
    """A record of one measurement.

    Args:
        kind: the command that made it: ``eval``, ``energy``, ``tasks``, ``long-context``, ...
        results: JSON values; what a repetition must give again.
        arguments: the command's options by their Python names, JSON values; enough to run it again.
        checkpoints: label -> folder of every checkpoint measured.
        data: what was read: source, name, sha256, documents, bytes, ...
        tokenizer_sha256: of the tokenizer the data was read with; None where the checkpoints have different
            ones (``results`` then has one per model).
        seed: of everything drawn at random; None if nothing was.
        n: units the standard errors are over; None where there is none.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "arguments": dict(arguments),
        "checkpoints": {label: identity(folder) for label, folder in checkpoints.items()},
        "data": None if data is None else dict(data),
        "tokenizer_sha256": tokenizer_sha256,
        "seed": seed,
        "n": n,
        "machine": machine(),
        "results": dict(results),
    }


def identity(folder: Path) -> dict[str, Any]:
    """What a checkpoint is: its path, the SHA-256 of its weights and its configuration.

    The hash runs over the safetensors files in the order of their names. Of a training run's folder it is the
    latest checkpoint that counts.
    """
    named, folder = folder, resolve_folder(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
    config = folder / "config.json"
    return {
        "path": str(named),
        "sha256": digest.hexdigest(),
        "config": json.loads(config.read_text()) if config.is_file() else None,
    }


def read(path: Path) -> dict[str, Any]:
    """A record from its file.

    Raises:
        DataError: there is no such file, it is not JSON, or not a record of this layout.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as a result: {error}") from error
    missing = [key for key in REQUIRED if not isinstance(found, dict) or key not in found]
    if missing:
        raise DataError(
            f"{path} is no result of a measurement (it has no {missing[0]!r}); expected a file that "
            "--json of spikelm eval or spikelm energy wrote"
        )
    if found["format"] != FORMAT:
        raise DataError(
            f"{path} has format {found['format']!r}; this version reads {FORMAT}; measure again with it"
        )
    return dict(found)
