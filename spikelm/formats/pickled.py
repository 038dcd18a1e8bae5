"""Read tensors from a ``.pth`` file without running anything that is in it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from spikelm.errors import CheckpointError

# Before 2.10 the restricted unpickler could be made to run code (GHSA advisories of 2025), so an older torch
# is refused instead of trusted.
SAFE_SINCE = (2, 10)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a file written by ``torch.save(model.state_dict())``, on the CPU.

    Only tensors and plain containers are accepted (``weights_only=True``). A wrapper of the form
    ``{"state_dict": {...}}`` or ``{"model": {...}}`` is opened, and a ``module.`` prefix that every name
    carries (data-parallel training) is dropped.

    Args:
        path: the file.

    Raises:
        CheckpointError: if the file is missing, is no such file, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {str(path)!r}; give the path of a .pth file")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_SINCE:
        raise CheckpointError(
            f"torch {torch.__version__} cannot read pickled weights safely; "
            f"install torch >= 2.10 to convert {path}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles that are refused a moment later
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign pickle can raise anything while it is taken apart
        # torch's own message recommends to load it all the same; only what the file asked for is passed on.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for the Python object {wanted.group(1)}" if wanted else type(error).__name__
        raise CheckpointError(
            f"{str(path)!r} is refused: it is not a plain file of tensors written by torch.save ({reason})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{str(path)!r} holds a {type(content).__name__}; expected named tensors (a state dict)"
        )
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of type {type(value).__name__}; expected only named tensors"
            )
        tensors[name] = value
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
