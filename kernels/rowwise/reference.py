"""Elementwise functions and norms as their definitions say it, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def unary(x: Tensor, function: str) -> Tensor:
    """The function of every element."""
    wide = x.double()
    forms = {
        "exp": torch.exp,
        "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "logsigmoid": lambda z: torch.minimum(z, torch.zeros_like(z)) - torch.log1p(torch.exp(-z.abs())),
        "softplus": lambda z: torch.maximum(z, torch.zeros_like(z)) + torch.log1p(torch.exp(-z.abs())),
    }
    y: Tensor = forms[function](wide)
    return y.to(x.dtype)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, kind: str) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) w + b, or x / sqrt(mean square + epsilon) w."""
    wide = x.double()
    if kind == "layernorm":
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    y = y if weight is None else y * weight.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)
