"""Gradient of the C form of the wkv recurrence, and the call that the public op makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spikelm.kernels.pointers import runs_directly
from spikelm.kernels.wkv4.c import forward, wkv4_backward, wkv4_forward


def wkv4(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, C] and state [B, 3, C] of decay [C], bonus [C], k and v [B, T, C]; float32 or float64."""
    run = forward if runs_directly(decay, bonus, k, v, state, reset, valid) else wkv4_forward
    y, last, _ = run(decay, bonus, k, v, state, reset, valid)
    return y, last


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    decay, bonus, k, v, _, reset, valid = inputs
    ctx.save_for_backward(decay, bonus, k, v, output[2], reset, valid)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    decay, bonus, k, v, checkpoints, reset, valid = ctx.saved_tensors
    grads = wkv4_backward(grad_y, grad_state, decay, bonus, k, v, checkpoints, reset, valid)
    return (*grads, None, None)


wkv4_forward.register_autograd(_backward, setup_context=_setup)
