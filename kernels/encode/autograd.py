"""Adaptive spike encoding with its straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm.kernels.encode import reference


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float, dead_zone: float, cap: int) -> tuple[Tensor, Tensor]:
        counts, threshold, clipped = reference.adaptive_encode(x, k, dead_zone, cap)
        # The cap bites rarely; a mask is kept only where it does.
        ctx.save_for_backward(threshold, clipped if bool(clipped.any()) else None)
        ctx.mark_non_differentiable(threshold)
        return counts, threshold

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        threshold, clipped = ctx.saved_tensors
        gradient = grads[0] / threshold
        if clipped is not None:
            gradient = gradient.masked_fill(clipped, 0.0)
        return gradient, None, None, None


def adaptive_encode(x: Tensor, *, k: float, dead_zone: float = 0.0, cap: int = 127) -> tuple[Tensor, Tensor]:
    """Integer counts n and threshold V with n V ~ x (SpikingBrain, arXiv 2509.05276, section 3.3).

    Args:
        x: [.., D]; bfloat16 and float16 are encoded in float32.
        k: V = mean|x| / k over the last dimension.
        dead_zone: counts are zero where |x| < dead_zone * mean|x|.
        cap: |count| <= cap.

    Returns:
        counts [.., D] and threshold [.., 1], float32 (float64 for float64). The gradient is
        straight-through, d(n V)/dx = 1 and zero where the cap bites; the threshold counts as constant.
    """
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    counts, threshold = _Encode.apply(x, k, dead_zone, cap)  # type: ignore[no-untyped-call]
    return counts, threshold
