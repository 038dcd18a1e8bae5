"""Gated linear attention in C (op.c) as torch custom ops for CPU tensors, float32 or float64.

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
from spikelm.kernels.gates import refuse_decay
from spikelm.kernels.pointers import address, contiguous_mask, threads_for

CHUNK = 32  # tokens of a chunk, as in chunk.h


@cache
def _library(dtype: torch.dtype) -> CDLL:
    library = load(Path(__file__).with_name("op.c"), ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    library.gla_scratch.argtypes = [*[c_int64] * 5, c_int]
    library.gla_scratch.restype = c_int64
    library.gla_forward.argtypes = [*[c_int64] * 7, c_double, *[c_void_p] * 11, c_int64, c_int]
    library.gla_backward.argtypes = [*[c_int64] * 7, c_double, *[c_void_p] * 15, c_int64, c_int]
    library.gla_backward.restype = None
    return library


@cache
def _scratch_size(dtype: torch.dtype, sizes: tuple[int, ...], backward: bool) -> int:
    return int(_library(dtype).gla_scratch(*sizes, int(backward)))


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
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    g = None if g is None else g.contiguous()
    sizes = _sizes(q, k, v, g)
    batch, steps, heads, groups, key_dim, value_dim, _ = sizes
    o, last = q.new_empty(batch, steps, heads, value_dim), torch.empty_like(state)
    states = q.new_empty(batch, groups, -(-steps // CHUNK) if keep else 0, key_dim, value_dim)
    threads = threads_for(q)
    size = 0 if steps == 1 else _scratch_size(q.dtype, sizes[2:], False)
    scratch = q.new_empty(threads, size)
    masks = (contiguous_mask(reset), contiguous_mask(valid))
    wrong = _library(q.dtype).gla_forward(
        *sizes,
        scale,
        *map(address, (q, k, v, g, state, *masks, o, last)),
        address(states) if keep else None,
        address(scratch),
        size,
        threads,
    )
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
    batch, steps, heads, _ = q.shape
    chunks = (steps + CHUNK - 1) // CHUNK if keep else 0
    groups, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    return (
        q.new_empty(batch, steps, heads, value_dim),
        state.new_empty(state.shape),
        q.new_empty(batch, groups, chunks, key_dim, value_dim),
    )


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
    grad_o, grad_state, q, k, v, states = (x.contiguous() for x in (grad_o, grad_state, q, k, v, states))
    g = None if g is None else g.contiguous()
    sizes = _sizes(q, k, v, g)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    grad_g = k.new_empty(0) if g is None else torch.empty_like(g)
    grad_first = torch.empty_like(grad_state)
    threads, size = threads_for(q), _scratch_size(q.dtype, sizes[2:], True)
    scratch = q.new_empty(threads, size)
    masks = (contiguous_mask(reset), contiguous_mask(valid))
    _library(q.dtype).gla_backward(
        *sizes,
        scale,
        *map(address, (q, k, v, g, *masks, states, grad_o, grad_state, *grads)),
        None if g is None else address(grad_g),
        address(grad_first),
        address(scratch),
        size,
        threads,
    )
    grad_q, grad_k, grad_v = grads
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
