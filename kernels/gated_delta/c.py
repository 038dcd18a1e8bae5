"""The gated delta rule in C (op.c) as torch custom ops for CPU tensors, float32 or float64.

A call walks chunks of CHUNK tokens from its first token on. The bits of a token's output depend neither on
later (finite) tokens, nor on the batch, nor on the number of threads. A text that is cut into several calls
gives the same bits where the cuts fall on multiples of CHUNK; elsewhere sums run in another order, and
results agree to rounding. A call with one token runs step.h, the step of a decode plan.

Training keeps the inputs and the state at the start of every chunk: K V values per CHUNK tokens and key-value
head.
"""

from __future__ import annotations

from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.gates import refuse_decay, refuse_not_finite
from spikelm.kernels.pointers import address, contiguous_mask, threads_for

CHUNK = 32  # tokens of a chunk, as in chunk.h


@cache
def _library(dtype: torch.dtype) -> CDLL:
    library = load(Path(__file__).with_name("op.c"), ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    library.gated_delta_scratch.argtypes = [*[c_int64] * 4, c_int]
    library.gated_delta_scratch.restype = c_int64
    library.gated_delta_forward.argtypes = [*[c_int64] * 6, c_double, *[c_void_p] * 12, c_int64, c_int]
    library.gated_delta_backward.argtypes = [*[c_int64] * 6, c_double, *[c_void_p] * 17, c_int64, c_int]
    library.gated_delta_backward.restype = None
    return library


@cache
def _scratch_size(dtype: torch.dtype, sizes: tuple[int, ...], backward: bool) -> int:
    return int(_library(dtype).gated_delta_scratch(*sizes, int(backward)))


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
    q, k, v, g, beta, state = (x.contiguous() for x in (q, k, v, g, beta, state))
    sizes = _sizes(q, k, v)
    batch, steps, heads, groups, key_dim, value_dim = sizes
    o, last = q.new_empty(batch, steps, heads, value_dim), torch.empty_like(state)
    states = q.new_empty(batch, groups, -(-steps // CHUNK) if keep else 0, key_dim, value_dim)
    threads = threads_for(q)
    size = 0 if steps == 1 else _scratch_size(q.dtype, sizes[2:], False)
    scratch = q.new_empty(threads, size)
    masks = (contiguous_mask(reset), contiguous_mask(valid))
    wrong = _library(q.dtype).gated_delta_forward(
        *sizes,
        scale,
        *map(address, (q, k, v, g, beta, state, *masks, o, last)),
        address(states) if keep else None,
        address(scratch),
        size,
        threads,
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
    batch, steps, heads, _ = q.shape
    chunks = (steps + CHUNK - 1) // CHUNK if keep else 0
    groups, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    return (
        q.new_empty(batch, steps, heads, value_dim),
        state.new_empty(state.shape),
        q.new_empty(batch, groups, chunks, key_dim, value_dim),
    )


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
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    grad_o, grad_state, states = (x.contiguous() for x in (grad_o, grad_state, states))
    sizes = _sizes(q, k, v)
    grads = [torch.empty_like(x) for x in (q, k, v, g, beta, grad_state)]
    threads, size = threads_for(q), _scratch_size(q.dtype, sizes[2:], True)
    scratch = q.new_empty(threads, size)
    masks = (contiguous_mask(reset), contiguous_mask(valid))
    _library(q.dtype).gated_delta_backward(
        *sizes,
        scale,
        *map(address, (q, k, v, g, beta, *masks, states, grad_o, grad_state, *grads, scratch)),
        size,
        threads,
    )
    grad_q, grad_k, grad_v, grad_g, grad_beta, grad_first = grads
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
