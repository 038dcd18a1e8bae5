"""Read the float files of rwkv.cpp (magic ``ggmf``), plain or compressed with xz.

Layout, little endian: six int32 (magic, version, vocabulary, hidden, layers, dtype), then per tensor int32
number of dimensions, key length and dtype, the dimensions (innermost first), the key, the data. The file
stores ``time_decay`` as ``-exp(time_decay)``; :func:`read_rwkv_cpp` undoes that, so names and values are
those of a ``.pth`` file.
"""

from __future__ import annotations

import lzma
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikelm.errors import CheckpointError

MAGIC = 0x67676D66
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
MAX_KEY_LENGTH = 256
MAX_DIMENSIONS = 3


@dataclass
class _Reader:
    """A cursor over the file's bytes that never reads past their end."""

    path: Path
    data: bytes
    position: int = 0

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes."""
        left = len(self.data) - self.position
        if count > left:
            raise CheckpointError(
                f"{str(self.path)!r} is truncated: {what} needs {count} bytes "
                f"at offset {self.position}, {left} are left"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def integers(self, count: int, what: str) -> tuple[int, ...]:
        """The next ``count`` int32 values."""
        return struct.unpack(f"<{count}i", self.take(4 * count, what))


def is_rwkv_cpp(path: Path) -> bool:
    """Whether a file (maybe compressed with xz) begins with the magic number of rwkv.cpp."""
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as compressed:
                head = compressed.read(4)
        else:
            with path.open("rb") as file:
                head = file.read(4)
    except (OSError, lzma.LZMAError, EOFError):
        return False
    return head == struct.pack("<I", MAGIC)


def read_rwkv_cpp(path: Path) -> dict[str, Tensor]:
    """Published name -> float32 tensor.

    Raises:
        CheckpointError: if the file is missing, truncated, quantised, or not an rwkv.cpp file.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {str(path)!r}; give the path of an rwkv.cpp file")
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, EOFError) as error:
        raise CheckpointError(f"{str(path)!r} is not a complete xz file: {error}") from error
    reader = _Reader(path, data)
    magic, version, vocab, hidden, layers, _ = reader.integers(6, "the header")
    if magic != MAGIC:
        raise CheckpointError(f"{str(path)!r} begins with {magic:#x}; expected the rwkv.cpp magic {MAGIC:#x}")
    tensors: dict[str, Tensor] = {}
    while reader.position < len(data):
        name, values = _read_tensor(reader)
        if name in tensors:
            raise CheckpointError(f"{str(path)!r} holds the tensor {name!r} twice")
        tensors[name] = values
    embedding = tensors.get("emb.weight")
    if embedding is None or tuple(embedding.shape) != (vocab, hidden):
        got = None if embedding is None else list(embedding.shape)
        raise CheckpointError(f"'emb.weight' has shape {got}; expected {[vocab, hidden]}, as the header says")
    if f"blocks.{layers - 1}.ln1.weight" not in tensors or f"blocks.{layers}.ln1.weight" in tensors:
        raise CheckpointError(
            f"{str(path)!r} does not hold the {layers} layers its header (version {version}) promises"
        )
    for name in list(tensors):
        if name.endswith("att.time_decay"):
            if bool((tensors[name] >= 0).any()):
                raise CheckpointError(f"the tensor {name!r} holds values >= 0; expected -exp(time_decay)")
            tensors[name] = torch.log(-tensors[name].double()).float()
    return tensors


def _read_tensor(reader: _Reader) -> tuple[str, Tensor]:
    rank, key_length, kind = reader.integers(3, "a tensor header")
    if not 1 <= rank <= MAX_DIMENSIONS or not 1 <= key_length <= MAX_KEY_LENGTH:
        raise CheckpointError(
            f"{str(reader.path)!r} is damaged before offset {reader.position}: a tensor of {rank} dimensions "
            f"with a name of {key_length} bytes"
        )
    shape = reader.integers(rank, "the dimensions")[::-1]
    name = reader.take(key_length, "a name").decode("utf-8", "replace")
    if kind not in DTYPES:
        raise CheckpointError(f"the tensor {name!r} has rwkv.cpp dtype {kind}; expected 0 (f32) or 1 (f16)")
    if min(shape) <= 0:
        raise CheckpointError(f"the tensor {name!r} has shape {list(shape)}; expected positive sizes")
    count = 1
    for size in shape:
        count *= size
    raw = reader.take(count * DTYPES[kind].itemsize, f"the tensor {name!r}")
    array = np.frombuffer(raw, dtype=DTYPES[kind]).reshape(shape).astype(np.float32)
    return name, torch.from_numpy(array)
