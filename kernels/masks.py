"""Checks of what stands beside the main input of an op: its masks and its other tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import ShapeError


def check_masks(x: Tensor, reset: Tensor | None, valid: Tensor | None) -> None:
    """Refuses masks that are not bool [B, T] on the device of x [B, T, C].

    Raises:
        ShapeError: naming the mask, what it is and what it should be.
    """
    if reset is None and valid is None:
        return
    size, device = x.shape, x.device
    for name, mask in (("reset", reset), ("valid", valid)):
        if mask is None:
            continue
        own = mask.shape
        fits = len(own) == 2 and own[0] == size[0] and own[1] == size[1]
        if not fits or mask.dtype != torch.bool or mask.device != device:
            raise ShapeError(
                f"{name} must be bool {list(x.shape[:2])} on {x.device}, "
                f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
            )


def check_companions(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Refuses tensors that are not floating or lie on another device than x; shapes are not looked at.

    Raises:
        ShapeError: naming the tensor, what it is and what it should be.
    """
    device = x.device
    for name, other in others.items():
        if other is not None and (not other.is_floating_point() or other.device != device):
            raise ShapeError(f"{op} needs floating {name} on {device}, got {other.dtype} on {other.device}")
