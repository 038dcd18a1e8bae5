"""Copies of a run's tensors in host memory, taken while training waits and written while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikelm.train.backend import Backend
from spikelm.train.ranks import Ranks
from spikelm.train.shards import Shares, stored_name

if TYPE_CHECKING:
    from spikelm.train.step import StepRunner

LANES, RANDOM = "lanes/", "random/"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """This rank's share of a checkpoint.

    Attributes:
        files: file name -> name in the file -> tensor in host memory.
        index: content of the index of split weights, or None.
    """

    files: dict[str, dict[str, Tensor]]
    index: str | None


class Snapshot:
    """Takes copies.

    The buffers are kept from one checkpoint to the next, so that their pages are touched for the first time
    only once; they are pinned where tensors come from a GPU. They take as much host memory as this rank's
    share of the checkpoint.

    Args:
        ranks: this process among those of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._buffers: dict[str, Tensor] = {}

    def take(self, backend: Backend, runner: StepRunner) -> Contents:
        """Copy this rank's share; called on all ranks together, after the copies before were written.

        Every rank keeps the state of its own lanes and of its own random generators.
        """
        shares = Shares(self._ranks.rank, self._ranks.world_size)
        kept: dict[str, Tensor] = {}
        for name, tensor in backend.tensors(shares.wanted):
            kept[name] = self._copy(name, tensor)
        own = {**runner.lane_tensors(), **random_tensors(self._ranks.rank, backend.device)}
        for name, tensor in own.items():
            kept[name] = self._copy(name, tensor)
        self._buffers = kept
        files: dict[str, dict[str, Tensor]] = {}
        for name, buffer in kept.items():
            files.setdefault(shares.file_of(name), {})[stored_name(name)] = buffer
        return Contents(files=files, index=shares.index())

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = _host_memory(tensor)
        return buffer.copy_(tensor)


def _host_memory(like: Tensor) -> Tensor:
    """Room for a tensor, contiguous."""
    if like.device.type == "cuda":
        try:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        except RuntimeError:
            pass  # the system allows no more pinned memory: the copy is slower, and that is all
    return torch.empty(like.shape, dtype=like.dtype)


def random_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """State of this rank's global generators, as ``random/RANK/DEVICE``."""
    prefix = f"{RANDOM}{rank:05d}/"
    tensors = {f"{prefix}cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors[f"{prefix}cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_random(tensors: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Inverse of :func:`random_tensors`; a rank or device that was not there before keeps its generator."""
    prefix = f"{RANDOM}{rank:05d}/"
    if f"{prefix}cpu" in tensors:
        torch.set_rng_state(tensors[f"{prefix}cpu"])
    if device.type == "cuda" and f"{prefix}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{prefix}cuda"], device)
