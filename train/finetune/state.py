"""What a fine-tuning run remembers between epochs, in a form that a kill cannot tear.

``state-N.safetensors`` (weights and optimiser after epoch N) is written first, then ``state.json``, which
names it with its SHA-256, in one step; only then the older one goes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikelm.errors import CheckpointError
from spikelm.train.files import replace_text, sha256, sync_file, why

STATE = "state.json"


@dataclass(kw_only=True)
class Epochs:
    """Where a run is.

    Attributes:
        epoch: epochs done.
        steps: optimiser steps done.
        best_epoch: the epoch with the best dev figure so far (0: none).
        best: that figure.
        history: one entry per epoch.
        seconds: time spent in training and dev evaluation.
        finished: whether the last epoch was reached, or patience ended.
    """

    epoch: int = 0
    steps: int = 0
    best_epoch: int = 0
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False


def write_state(
    folder: Path, epochs: Epochs, identity: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Replace the state in ``folder``.

    Raises:
        CheckpointError: the disk refuses; the older state is then intact.
    """
    path = folder / f"state-{epochs.epoch}.safetensors"
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        sync_file(path)
        values = {
            "epochs": vars(epochs),
            "identity": identity,
            "file": path.name,
            "sha256": sha256(path),
        }
        replace_text(folder / STATE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        for old in folder.glob("state-*.safetensors"):
            if old != path:
                old.unlink()
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            if not _names(folder, path.name):
                path.unlink()
        raise CheckpointError(
            f"the state of epoch {epochs.epoch} cannot be written to {folder} ({why(error)}); the epoch "
            "before is intact; make room or mend the permissions and start the same command again"
        ) from error


def read_state(folder: Path) -> tuple[Epochs, dict[str, Any]] | None:
    """The state in ``folder`` and whose it is; None where there is none.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        epochs = Epochs(**values["epochs"])
        file, expected, identity = folder / Path(values["file"]).name, values["sha256"], values["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove {folder} to start this run anew"
        ) from error
    if not file.is_file() or sha256(file) != expected:
        raise CheckpointError(
            f"{file} is missing or was changed after it was written; remove {folder} to start this run anew"
        )
    return epochs, identity


def read_tensors(folder: Path, epochs: Epochs) -> dict[str, Tensor]:
    """The tensors that belong to a state (its checksum was compared by :func:`read_state`)."""
    return load_file(folder / f"state-{epochs.epoch}.safetensors")


def _names(folder: Path, name: str) -> bool:
    """Whether the state in ``folder`` is the one with this file."""
    try:
        return bool(json.loads((folder / STATE).read_text(encoding="utf-8"))["file"] == name)
    except (OSError, ValueError, KeyError):
        return False
