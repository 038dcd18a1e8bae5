"""Sigmoid, silu, their logarithms, softmax and lerp, with the same bits wherever an element stands.

torch's own compute the last few elements of a tensor (and of each thread's share of it) in another way than
the rest, so that a value may differ in its last bit with the batch it is in. The forms of
:mod:`spikelm.kernels.rowwise` do not; in C they are those of decode plans. Where a gradient is asked for
torch's forms are used, which keep less for backward: bit equality is a promise of inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikelm.kernels import rowwise


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), in x's dtype (computed in float32 at least)."""
    return x.sigmoid() if torch.is_grad_enabled() else rowwise.unary(x, "sigmoid")


def silu(x: Tensor) -> Tensor:
    """X * sigmoid(x), in x's dtype (computed in float32 at least)."""
    return torch.nn.functional.silu(x) if torch.is_grad_enabled() else rowwise.unary(x, "silu")


def logsigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x), in x's dtype (computed in float32 at least)."""
    return torch.nn.functional.logsigmoid(x) if torch.is_grad_enabled() else rowwise.unary(x, "logsigmoid")


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), in x's dtype (computed in float32 at least)."""
    return torch.nn.functional.softplus(x) if torch.is_grad_enabled() else rowwise.unary(x, "softplus")


def exp(x: Tensor) -> Tensor:
    """Exponential of x, in its dtype (computed in float32 at least); 0 below -87 in C."""
    return x.exp() if torch.is_grad_enabled() else rowwise.unary(x, "exp")


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension of x [.., D], in its dtype."""
    return x.softmax(-1) if torch.is_grad_enabled() else rowwise.softmax(x)


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """start + weight (end - start) of [.., D], [.., D] and weight [D], in end's dtype."""
    weight = weight.to(end.dtype)
    if torch.is_grad_enabled():
        return torch.lerp(start, end, weight)
    return rowwise.lerp(start, end, weight)


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
