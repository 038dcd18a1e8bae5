"""Files of a checkpoint's tensors: their names, which rank writes which, how they are written and read.

Weights are ``model.safetensors`` up to :data:`WEIGHTS_LIMIT` bytes and beyond it ``model-0000I-of-0000N.
safetensors`` with an index, as Hugging Face names them; what only resume needs is ``training.safetensors``,
with several ranks one file of each, ``training-0000I-of-0000W.safetensors``. How tensors were split is
forgotten when they are read: any number of ranks reads any number of files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikelm.checkpoint import PREFIX, WEIGHTS, WEIGHTS_INDEX
from spikelm.errors import CheckpointError
from spikelm.train.backend import MODEL
from spikelm.train.files import Seal

WEIGHTS_LIMIT = 5_000_000_000
"""Bytes of one file of weights; more are split, as Hugging Face splits them."""

_PIECE = 16 << 20
"""Bytes that are written and hashed at a time."""

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def training_file(rank: int, world_size: int) -> str:
    """Name of a rank's file of what only resume needs."""
    return (
        "training.safetensors"
        if world_size == 1
        else f"training-{rank + 1:05d}-of-{world_size:05d}.safetensors"
    )


def weights_file(shard: int, shards: int) -> str:
    """Name of one of the files of weights."""
    return WEIGHTS if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


class Shares:
    """Which rank writes which tensor of one checkpoint; every rank comes to the same answer by itself.

    Weights fill one file after the other (the first belongs to rank 0, the next to rank 1, and so on); each
    other tensor goes to the rank that has the fewest bytes so far.

    Args:
        rank, world_size: this rank among all.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._load = [0] * world_size
        self._shard_of: dict[str, int] = {}
        self._shards = 1
        self._fill = 0
        self._total = 0

    def wanted(self, name: str, nbytes: int) -> bool:
        """Whether this rank writes the tensor; asked for every tensor in the same order on every rank."""
        if name.startswith(MODEL):
            if self._fill and self._fill + nbytes > WEIGHTS_LIMIT:
                self._shards += 1
                self._fill = 0
            self._fill += nbytes
            self._total += nbytes
            self._shard_of[name] = self._shards - 1
            owner = (self._shards - 1) % len(self._load)
        else:
            owner = min(range(len(self._load)), key=lambda rank: (self._load[rank], rank))
        self._load[owner] += nbytes
        return owner == self._rank

    def file_of(self, name: str) -> str:
        """The file that holds a tensor this rank writes, once all were asked about."""
        if name in self._shard_of:
            return weights_file(self._shard_of[name], self._shards)
        return training_file(self._rank, len(self._load))

    def index(self) -> str | None:
        """Content of ``model.safetensors.index.json``, or None where the weights are one file."""
        if self._shards == 1:
            return None
        files = {stored_name(name): self.file_of(name) for name in sorted(self._shard_of)}
        return json.dumps({"metadata": {"total_size": self._total}, "weight_map": files}, indent=2) + "\n"


def stored_name(name: str) -> str:
    """Name of a tensor in its file: weights are called as transformers calls them."""
    return PREFIX + name.removeprefix(MODEL) if name.startswith(MODEL) else name


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Seal:
    """Write a file of tensors through to the disk and take its checksum on the way.

    safetensors' own writer copies every tensor and holds the interpreter while it writes; this one does
    neither, so training goes on beside it.

    Args:
        path: the file.
        tensors: contiguous tensors in host memory.

    Raises:
        OSError: the disk is full or not writable.
    """
    # Large items first keep every tensor aligned to its own item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as stream:
        for piece in (len(text).to_bytes(8, "little"), text, *_pieces(tensors[name] for name in names)):
            stream.write(piece)
            digest.update(piece)
            written += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return Seal(bytes=written, sha256=digest.hexdigest())


def _pieces(tensors: Iterator[Tensor]) -> Iterator[Any]:
    """The bytes of tensors, without copies."""
    for tensor in tensors:
        if tensor.numel():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), _PIECE):
                yield data[start : start + _PIECE]


class StoredTensors:
    """The tensors of a checkpoint folder by name, each read when it is asked for.

    Args:
        folder: a checkpoint whose checksums were compared.

    Raises:
        CheckpointError: there are no weights, or a file is no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        index = folder / WEIGHTS_INDEX
        weights = sorted(folder.glob("model-*-of-*.safetensors")) if index.is_file() else [folder / WEIGHTS]
        for path in [*weights, *sorted(folder.glob("training*.safetensors"))]:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read ({error})") from error
            for key in self._open[path].keys():  # noqa: SIM118 (no mapping)
                self._files[_own_name(key) if path in weights else key] = path

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor whose name begins with ``prefix``."""
        names = sorted(name for name in self._files if name.startswith(prefix))
        return {name: value for name in names if (value := self.read(name)) is not None}

    def read(self, name: str) -> Tensor | None:
        """A tensor in memory of its own (the file may go away), or None where there is none of that name."""
        path = self._files.get(name)
        if path is None:
            return None
        found: Tensor = self._open[path].get_tensor(stored_name(name))
        return found.clone()


def _own_name(key: str) -> str:
    return MODEL + key.removeprefix(PREFIX)
