"""Gated linear attention in C (op.c) as torch custom ops for CPU tensors, float32 or float64.

A call walks chunks of CHUNK tokens from its first token on. The bits of a token's output depend neither on
later (finite) tokens, nor on the batch, nor on the number of threads. A text that is cut into several calls
gives the same bits where the cuts fall on multiples of CHUNK; elsewhere sums run in another order, and
results agree to rounding. A call with one token runs step.h, the step of a decode plan.

Training keeps the inputs and the state at the start of every chunk: K V values per CHUNK tokens and key-value
head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.chunks import CHUNK, ChunkedOp
from spikelm.kernels.gates import refuse_decay

__all__ = ["CHUNK", "gla_backward", "gla_forward"]

_OP = ChunkedOp(name="gla", source=Path(__file__).with_name("op.c"), sizes=7, inputs=4)


def _sizes(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> tuple[int, ...]:
    """B, T, H, G, K, V and gates per head."""
    return (*q.shape[:3], k.shape[2], k.shape[3], v.shape[3], 0 if g is None else g.shape[3])


@torch.library.custom_op("spikelm::gla_forward", mutates_args=(), device_types="cpu")
def gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, V], last state [B, G, K, V], and with ``keep`` states [B, G, chunks, K, V]."""
    o, last, states, wrong = _OP.forward(_sizes(q, k, v, g), (q, k, v, g), state, scale, reset, valid, keep)
    if wrong and g is not None:
        refuse_decay("gla", "g", g, valid)
    return o, last, states


@gla_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _OP.forward_like(q, k, v, state, keep)


@torch.library.custom_op("spikelm::gla_backward", mutates_args=(), device_types="cpu")
def gla_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty without g) and the incoming state; shapes as theirs."""
    grads, grad_first = _OP.backward(
        _sizes(q, k, v, g), (q, k, v, g), states, grad_o, grad_state, scale, reset, valid
    )
    grad_q, grad_k, grad_v, grad_g = (k.new_empty(0) if x is None else x for x in grads)
    return grad_q, grad_k, grad_v, grad_g, grad_first


@gla_backward.register_fake
def _(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    grad_g = k.new_empty(0) if g is None else g.new_empty(g.shape)
    return grads[0], grads[1], grads[2], grad_g, grad_state.new_empty(grad_state.shape)
