"""Elementwise functions and norms in plain torch.

``exp`` and ``log1p`` of torch give an element the same bits wherever it stands, and so do division and
addition; ``torch.sigmoid`` and its kin do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unary(x: Tensor, function: str) -> Tensor:
    """The function of every element."""
    if function == "exp":
        return x.exp()
    if function == "sigmoid":
        return (1 + (-x).exp()).reciprocal()
    if function == "silu":
        return x / (1 + (-x).exp())
    if function == "logsigmoid":
        return x.clamp(max=0) - (-x.abs()).exp().log1p()
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, kind: str) -> Tensor:
    """torch's own norms."""
    if kind == "layernorm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, epsilon)
