"""``firing.json`` in a checkpoint: how silent each projection's inputs were when that was measured.

``spikelm convert spike`` writes it; everything that loads a model for decoding takes it from here
(:func:`take_firing`), so that int8 weights get the layout that suits their inputs
(:func:`spikelm.weights.choose_layout`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from spikelm.errors import CheckpointError, nearest
from spikelm.projection import Projection

if TYPE_CHECKING:
    from spikelm.model import SpikeLM

FIRING = "firing.json"
"""Path of a projection -> silent share of its input counts."""


def read_firing(folder: str | Path) -> dict[str, float]:
    """Path of a projection -> measured silent share of its input counts; empty where none was measured.

    Raises:
        CheckpointError: a file that holds something else.
    """
    path = Path(folder) / FIRING
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore the file, or remove it") from error
    items = values.items() if isinstance(values, dict) else [(path.name, values)]
    for name, value in items:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise CheckpointError(
                f"{path}: {name} is {value!r}; expected the silent share of a projection, from 0 to 1"
            )
    return {str(name): float(value) for name, value in items}


def take_firing(model: SpikeLM, folder: str | Path) -> None:
    """Give a model what its checkpoint folder says of its inputs, as ``model.firing``.

    Raises:
        CheckpointError: a file that holds something else, or names a projection that the model lacks.
    """
    firing = read_firing(folder)
    if model.head is None:  # a classifier made of a language model
        firing.pop("head", None)
    known = {path for path, module in model.named_modules() if isinstance(module, Projection)}
    for path in firing:
        if path not in known:
            raise CheckpointError(
                f"{Path(folder) / FIRING}: {nearest('projection', path, sorted(known))}; the file belongs to "
                "another model: remove it, or restore the right one"
            )
    model.firing = firing


def firing_file(model: SpikeLM) -> dict[str, bytes]:
    """The file's name -> its content; nothing where nothing was measured."""
    return {FIRING: (json.dumps(model.firing, indent=2) + "\n").encode()} if model.firing else {}


def write_firing(model: SpikeLM, folder: str | Path) -> None:
    """Write what a model knows of its inputs beside its weights; no file is left where that is nothing."""
    path = Path(folder) / FIRING
    path.unlink(missing_ok=True)  # may be that of another model, whose folder is written over
    for content in firing_file(model).values():
        path.write_bytes(content)
