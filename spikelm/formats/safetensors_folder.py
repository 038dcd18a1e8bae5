"""The weights of a foreign model folder, read tensor by tensor, with nothing in the folder trusted.

Only safetensors are opened (a memory map, so a tensor costs memory while it is used). Pickled weights are
refused, code and ``auto_map`` are never looked at, and an index may only name files of its own folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikelm.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pth", ".pt", ".ckpt")
LARGEST_JSON = 64 << 20
"""Bytes of JSON that are read; the index of a model of a trillion parameters has about a hundredth."""


class SafetensorsFolder:
    """A folder of safetensors files: one, or shards with an index. Use it in a ``with`` statement.

    Args:
        folder: where they lie.

    Attributes:
        files: tensor name -> name of the file that holds it.

    Raises:
        CheckpointError: no safetensors, a damaged file or index, a file outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index and the headers; no tensor yet."""
        self.folder = folder
        self._stack = ExitStack()
        try:
            self._open = {name: self._opened(name) for name in self._names()}
            self.files = self._located()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> SafetensorsFolder:
        """The folder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._open[self.files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header.

        Raises:
            CheckpointError: one that is no float or integer dtype of torch's.
        """
        stored = self._open[self.files[name]].get_slice(name).get_dtype()
        dtype = _DTYPES.get(stored)
        if dtype is None:
            raise CheckpointError(
                f"{self.folder / self.files[name]}: the tensor {name!r} is {stored}; expected one of "
                f"{', '.join(sorted(_DTYPES))}"
            )
        return dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor itself.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            value: Tensor = self._open[self.files[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / self.files[name]}: the tensor {name!r} cannot be read ({error}); "
                "fetch the file again"
            ) from error
        return value

    def _names(self) -> list[str]:
        """Files of weights: those of the index, or the single one."""
        if (self.folder / INDEX).is_file():
            self._index = self._read_index()
            return sorted(set(self._index.values()))
        self._index = {}
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickled = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLED)
        if pickled:
            raise CheckpointError(
                f"{self.folder} holds pickled weights ({pickled[0]}), which can run code when they are read; "
                "convert them to safetensors first"
            )
        raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; expected safetensors")

    def _read_index(self) -> Mapping[str, str]:
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map from tensor to file; fetch it again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path} puts the tensor {name!r} into {file!r}; expected the name of a .safetensors "
                    "file in the same folder"
                )
        return weight_map

    def _opened(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the index names it, so fetch it again")
        try:
            return self._stack.enter_context(safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({error}); fetch it again"
            ) from error

    def _located(self) -> dict[str, str]:
        """Every tensor of every file, checked against the index."""
        found: dict[str, str] = {}
        for file, handle in self._open.items():
            for name in handle.keys():  # noqa: SIM118 (this object is no mapping)
                if name in found:
                    raise CheckpointError(
                        f"{self.folder}: the tensor {name!r} stands in {found[name]} and in {file}; "
                        "expected it once"
                    )
                found[name] = file
        for name, file in self._index.items():
            if found.get(name) != file:
                raise CheckpointError(
                    f"{self.folder / INDEX} puts the tensor {name!r} into {file}, which does not hold it; "
                    "fetch both again"
                )
        return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a foreign folder.

    Raises:
        CheckpointError: no such file, too large, no JSON, or no object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; expected the folder of a published model")
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; expected a small JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
