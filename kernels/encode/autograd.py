"""Gradient of the C form of adaptive spike encoding, and the calls that the public ops make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm.kernels.encode import c, reference
from spikelm.kernels.pointers import runs_directly


def adaptive_encode(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Counts [.., D] and threshold [.., 1] of x [.., D], float32 or float64."""
    run = c.forward if runs_directly(x, mean) else c.encode_forward
    counts, threshold, _, _ = run(x, k, dead_zone, cap, mean)
    return counts, threshold


def adaptive_encode_int8(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int8 [.., D], threshold [.., 1] and statistics [.., 4] of x [.., D]; no gradient."""
    run = c.int8 if runs_directly(x, mean) else c.encode_int8
    counts, threshold, statistics = run(x, k, dead_zone, cap, mean)
    return counts, threshold, statistics


def decode_counts(counts: Tensor, threshold: Tensor) -> Tensor:
    """N V; the C form is for int8, floating counts are one product already."""
    if counts.dtype != torch.int8:
        return reference.decode_counts(counts, threshold)
    threshold = threshold.detach()
    return (c.decode if runs_directly(counts, threshold) else c.decode_int8)(counts, threshold)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, threshold, slots, mask = output
    ctx.save_for_backward(threshold, slots, mask)
    ctx.mark_non_differentiable(threshold, slots, mask)


def _backward(ctx: Any, grad_counts: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None, None, None]:
    return c.encode_backward(grad_counts, *ctx.saved_tensors), None, None, None, None


c.encode_forward.register_autograd(_backward, setup_context=_setup)
