"""Adaptive spike encoding in plain torch: the reference's counts, a gradient that keeps no activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm.kernels.encode import reference


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        counts, threshold, clipped = reference.encode(x, k, dead_zone, cap, mean)
        # The cap bites rarely; a mask is kept only where it does.
        ctx.save_for_backward(threshold, clipped if bool(clipped.any()) else None)
        ctx.mark_non_differentiable(threshold)
        return counts, threshold

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        threshold, clipped = ctx.saved_tensors
        gradient = grads[0] / threshold
        if clipped is not None:
            gradient = gradient.masked_fill(clipped, 0.0)
        return gradient, None, None, None, None


def adaptive_encode(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Counts [.., D] and threshold [.., 1] of x [.., D], float32 or float64."""
    counts, threshold = _Encode.apply(x, k, dead_zone, cap, mean)  # type: ignore[no-untyped-call]
    return counts, threshold
