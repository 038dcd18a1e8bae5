"""A checkpoint folder written tensor by tensor, so that a model need not fit into memory twice.

Weights stand in one file where they fit into a shard, else in shards with an index, both as Hugging Face
names them; what is held at a time is one shard. Written whole or not at all, like every checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from spikelm.checkpoint import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    WEIGHTS_INDEX,
    config_json,
    replace_folder,
    sync_folder,
)
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer

SHARD_BYTES = 2 << 30


def save_streamed(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint folder, replacing an older one.

    Args:
        folder: where.
        config: of the model.
        tensors: parameter name of the core -> tensor; every tensor is taken once, in order.
        tokenizer: to keep with the weights.
        shard_bytes: a shard is written before it would become larger (unless one tensor is).

    Raises:
        CheckpointError: tensors that do not fit the configuration, or a disk that refuses; an older folder
            is then left as it was.
    """
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        expected = _expected(config)
        dtype = _write(temporary, tensors, expected, shard_bytes)
        content = json.dumps(config_json(config, dtype), indent=2) + "\n"
        (temporary / CONFIG).write_text(content, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(temporary)
        sync_folder(temporary)
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _expected(config: ModelConfig) -> dict[str, torch.Size]:
    from spikelm.model import SpikeLM

    with torch.device("meta"):
        model = SpikeLM(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("head.linear.weight", None)
    return expected


def _write(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], expected: dict[str, torch.Size], shard_bytes: int
) -> torch.dtype:
    """Write the shards and the index; returns the dtype of the first tensor, the embedding."""
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    dtype: torch.dtype | None = None
    total = held = 0

    def flush() -> None:
        if waiting:
            path = folder / _part(len(shards))
            save_file(waiting, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
            shards.append(list(waiting))
            waiting.clear()

    missing = set(expected)
    for name, value in tensors:
        if name not in missing or value.shape != expected[name]:
            wanted = f"expected {list(expected[name])}, once" if name in expected else "no such parameter"
            raise CheckpointError(f"the converted tensor {name!r} is {list(value.shape)}; {wanted}")
        missing.remove(name)
        dtype = value.dtype if dtype is None else dtype
        size = value.numel() * value.element_size()
        if held + size > shard_bytes:
            flush()
            held = 0
        waiting[PREFIX + name] = value.contiguous()
        held, total = held + size, total + size
    if missing:
        raise CheckpointError(f"the converted weights lack {min(missing)!r} ({len(missing)} in all)")
    flush()
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / WEIGHTS)
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for i, file in enumerate(files):
            (folder / _part(i)).rename(folder / file)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dtype or torch.float32


def _part(index: int) -> str:
    return f"part-{index}.safetensors"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
