"""The gated delta rule in C (op.c) as torch custom ops for CPU tensors, float32 or float64.

A call walks chunks of CHUNK tokens from its first token on. The bits of a token's output depend neither on
later (finite) tokens, nor on the batch, nor on the number of threads. A text that is cut into several calls
gives the same bits where the cuts fall on multiples of CHUNK; elsewhere sums run in another order, and
results agree to rounding. A call with one token runs step.h, the step of a decode plan.

Training keeps the inputs and the state at the start of every chunk: K V values per CHUNK tokens and key-value
head.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from spikelm.kernels.chunks import CHUNK, ChunkedOp
from spikelm.kernels.gates import refuse_decay, refuse_not_finite

__all__ = ["CHUNK", "gated_delta_backward", "gated_delta_forward"]

_OP = ChunkedOp(name="gated_delta", source=Path(__file__).with_name("op.c"), sizes=6, inputs=5)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """B, T, H, G, K and V."""
    return (*q.shape[:3], k.shape[2], k.shape[3], v.shape[3])


@torch.library.custom_op("spikelm::gated_delta_forward", mutates_args=(), device_types="cpu")
def gated_delta_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, V], last state [B, G, K, V], and with ``keep`` states [B, G, chunks, K, V]."""
    o, last, states, wrong = _OP.forward(
        _sizes(q, k, v), (q, k, v, g, beta), state, scale, reset, valid, keep
    )
    if wrong:
        refuse_decay("gated_delta", "g", g, valid)
        refuse_not_finite("gated_delta", "beta", beta, valid)
    return o, last, states


@gated_delta_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _OP.forward_like(q, k, v, state, keep)


@torch.library.custom_op("spikelm::gated_delta_backward", mutates_args=(), device_types="cpu")
def gated_delta_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the incoming state; shapes as theirs."""
    grads, grad_first = _OP.backward(
        _sizes(q, k, v), (q, k, v, g, beta), states, grad_o, grad_state, scale, reset, valid
    )
    grad_q, grad_k, grad_v, grad_g, grad_beta = (cast(Tensor, x) for x in grads)
    return grad_q, grad_k, grad_v, grad_g, grad_beta, grad_first


@gated_delta_backward.register_fake
def _(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v, grad_g, grad_beta, grad_first = (
        x.new_empty(x.shape) for x in (q, k, v, g, beta, grad_state)
    )
    return grad_q, grad_k, grad_v, grad_g, grad_beta, grad_first
