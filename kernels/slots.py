"""Checks of the (state pool, slots) pair that every decode op takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikelm.errors import ShapeError


def check_slots(op: str, x: Tensor, pool: Tensor, slots: Tensor, shape: Sequence[int]) -> None:
    """Refuses a pool that is not [S, *shape] or slots that are not [B] for x [B, ..], all on one device.

    Raises:
        ShapeError: naming the argument, what it is and what it should be.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if tuple(pool.shape[1:]) != tuple(shape) or pool.dtype != wide or not pool.is_contiguous():
        raise ShapeError(
            f"{op} needs a contiguous {wide} pool [S, {', '.join(map(str, shape))}], "
            f"got {pool.dtype} {list(pool.shape)}, contiguous: {pool.is_contiguous()}"
        )
    if slots.shape != x.shape[:1] or slots.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"{op} needs slots of int32 or int64 {[x.shape[0]]}, got {slots.dtype} {list(slots.shape)}"
        )
    if pool.device != x.device or slots.device != x.device:
        raise ShapeError(
            f"{op} needs everything on {x.device}, got the pool on {pool.device}, slots on {slots.device}"
        )
