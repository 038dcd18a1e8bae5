"""Sigmoid and silu that give the same bits wherever an element stands.

torch's own compute the last few elements of a tensor (and of each thread's share of it) in another way than
the rest, so that a value may differ in its last bit with the batch it is in. ``exp`` does not, and neither do
division and addition. Where a gradient is asked for torch's forms are used, which keep less for backward: bit
equality is a promise of inference.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
