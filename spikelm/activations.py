"""Sigmoid, silu and their logarithms, with the same bits wherever an element stands.

torch's own compute the last few elements of a tensor (and of each thread's share of it) in another way than
the rest, so that a value may differ in its last bit with the batch it is in. ``exp`` and ``log1p`` do not,
and neither do division and addition. Where a gradient is asked for torch's forms are used, which keep less
for backward: bit equality is a promise of inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), in x's dtype (computed in float32 at least)."""
    if torch.is_grad_enabled():
        return x.sigmoid()
    return (1 + (-_wide(x)).exp()).reciprocal().to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """X * sigmoid(x), in x's dtype (computed in float32 at least)."""
    if torch.is_grad_enabled():
        return torch.nn.functional.silu(x)
    x_wide = _wide(x)
    return (x_wide / (1 + (-x_wide).exp())).to(x.dtype)


def logsigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x), in x's dtype (computed in float32 at least)."""
    if torch.is_grad_enabled():
        return torch.nn.functional.logsigmoid(x)
    x_wide = _wide(x)
    return (x_wide.clamp(max=0) - (-x_wide.abs()).exp().log1p()).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), in x's dtype (computed in float32 at least)."""
    if torch.is_grad_enabled():
        return torch.nn.functional.softplus(x)
    x_wide = _wide(x)
    return (x_wide.clamp(min=0) + (-x_wide.abs()).exp().log1p()).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2, in x's dtype; what backward keeps is max(x, 0) alone. Differentiable once."""
    y: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return y


class _SquaredReLU(torch.autograd.Function):
    """Three passes over memory less than autograd's own, in a model's widest layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        gradient: Tensor = (grads[0] * positive).mul_(2)
        return gradient


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
