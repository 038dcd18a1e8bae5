"""Gradient of the C form of adaptive spike encoding, and the call that the public op makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spikelm.kernels.encode.c import encode_backward, encode_forward


def adaptive_encode(x: Tensor, k: float, dead_zone: float, cap: int) -> tuple[Tensor, Tensor]:
    """Counts [.., D] and threshold [.., 1] of x [.., D], float32 or float64."""
    counts, threshold, _, _ = encode_forward(x, k, dead_zone, cap)
    return counts, threshold


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, threshold, slots, mask = output
    ctx.save_for_backward(threshold, slots, mask)
    ctx.mark_non_differentiable(threshold, slots, mask)


def _backward(ctx: Any, grad_counts: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None, None]:
    return encode_backward(grad_counts, *ctx.saved_tensors), None, None, None


encode_forward.register_autograd(_backward, setup_context=_setup)
