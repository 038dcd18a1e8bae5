"""Elementwise functions and norms as their definitions say it, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def unary(x: Tensor, function: str) -> Tensor:
    """The function of every element."""
    z = x.double()
    if function == "exp":
        y = torch.exp(z)
    elif function == "sigmoid":
        y = 1 / (1 + torch.exp(-z))
    elif function == "silu":
        y = z / (1 + torch.exp(-z))
    else:
        positive = torch.log1p(torch.exp(-z.abs()))
        zero = torch.zeros_like(z)
        y = (
            torch.minimum(z, zero) - positive
            if function == "logsigmoid"
            else torch.maximum(z, zero) + positive
        )
    return y.to(x.dtype)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, kind: str) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) w + b, or x / sqrt(mean square + epsilon) w."""
    wide = x.double()
    if kind == "layernorm":
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    y = y if weight is None else y * weight.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)
