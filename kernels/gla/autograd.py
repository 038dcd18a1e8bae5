"""Gradient of the C form of gated linear attention, and the call that the public op makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm.kernels.gla.c import gla_backward, gla_forward


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and state [B, G, K, V]; shapes as in the op, float32 or float64."""
    given = (q, k, v, state) if g is None else (q, k, v, g, state)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    o, last, _ = gla_forward(q, k, v, g, state, scale, reset, valid, keep)
    return o, last


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, _, scale, reset, valid, _ = inputs
    ctx.save_for_backward(q, k, v, g, output[2], reset, valid)
    ctx.mark_non_differentiable(output[2])
    ctx.scale = scale


def _backward(ctx: Any, grad_o: Tensor, grad_state: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, states, reset, valid = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_g, grad_first = gla_backward(
        grad_o, grad_state, q, k, v, g, states, ctx.scale, reset, valid
    )
    return grad_q, grad_k, grad_v, None if g is None else grad_g, grad_first, None, None, None, None


gla_forward.register_autograd(_backward, setup_context=_setup)
