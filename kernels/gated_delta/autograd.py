"""Gradient of the C form of the gated delta rule, and the call that the public op makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm.kernels.gated_delta.c import gated_delta_backward, gated_delta_forward


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, G, n, V] and state [B, G, K, V] of q [B, T, G, n, K]; float32 or float64."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, state))
    o, last, _ = gated_delta_forward(q.flatten(2, 3), k, v, g, beta, state, scale, reset, valid, keep)
    return o.unflatten(2, q.shape[2:4]), last


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, beta, _, scale, reset, valid, _ = inputs
    ctx.save_for_backward(q, k, v, g, beta, output[2], reset, valid)
    ctx.mark_non_differentiable(output[2])
    ctx.scale = scale


def _backward(ctx: Any, grad_o: Tensor, grad_state: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, states, reset, valid = ctx.saved_tensors
    grads = gated_delta_backward(grad_o, grad_state, q, k, v, g, beta, states, ctx.scale, reset, valid)
    return (*grads, None, None, None, None)


gated_delta_forward.register_autograd(_backward, setup_context=_setup)
