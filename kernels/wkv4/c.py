"""The wkv recurrence of RWKV-4 in C (op.c) as torch custom ops for CPU tensors, float32 or float64."""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.pointers import address, contiguous_mask, threads_for
from spikelm.kernels.wkv4.reference import refuse_gates

SEGMENT = 32  # steps between checkpoints, as in op.c


@cache
def _library(dtype: torch.dtype) -> CDLL:
    library = load(Path(__file__).with_name("op.c"), ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    library.wkv4_forward.argtypes = [*[c_int64] * 3, *[c_void_p] * 10, c_int]
    library.wkv4_backward.argtypes = [*[c_int64] * 3, *[c_void_p] * 16, c_int]
    library.wkv4_backward.restype = None
    return library


def forward(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, C], last state [B, 3, C] and checkpoints [B, ceil(T / SEGMENT), 3, C]."""
    decay, bonus, k, v, state = (x.contiguous() for x in (decay, bonus, k, v, state))
    rows, steps, channels = k.shape
    y, last = torch.empty_like(v), torch.empty_like(state)
    checkpoints = k.new_empty(rows, -(-steps // SEGMENT), 3, channels)
    given = (decay, bonus, k, v, state, contiguous_mask(reset), contiguous_mask(valid))
    wrong = _library(k.dtype).wkv4_forward(
        rows, steps, channels, *map(address, (*given, y, last, checkpoints)), threads_for(k)
    )
    if wrong:
        refuse_gates("wkv4", decay, bonus)
    return y, last, checkpoints


wkv4_forward = torch.library.custom_op("spikelm::wkv4_forward", forward, mutates_args=(), device_types="cpu")


@wkv4_forward.register_fake
def _(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps, channels = k.shape
    checkpoints = k.new_empty(rows, (steps + SEGMENT - 1) // SEGMENT, 3, channels)
    return v.new_empty(v.shape), state.new_empty(state.shape), checkpoints


@torch.library.custom_op("spikelm::wkv4_backward", mutates_args=(), device_types="cpu")
def wkv4_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of decay [C], bonus [C], k and v [B, T, C] and the incoming state [B, 3, C] (0 for max)."""
    decay, bonus, k, v, checkpoints = (x.contiguous() for x in (decay, bonus, k, v, checkpoints))
    grad_y, grad_state = grad_y.contiguous(), grad_state.contiguous()
    rows, steps, channels = k.shape
    grads = [torch.empty_like(x) for x in (decay, bonus, k, v, grad_state)]
    grad_decay, grad_bonus, grad_k, grad_v, grad_first = grads
    decay_rows, bonus_rows = k.new_empty(2, rows, channels)
    masks = (contiguous_mask(reset), contiguous_mask(valid))
    given = (decay, bonus, k, v, *masks, checkpoints, grad_y, grad_state)
    wanted = (grad_k, grad_v, grad_first, decay_rows, bonus_rows, grad_decay, grad_bonus)
    _library(k.dtype).wkv4_backward(rows, steps, channels, *map(address, (*given, *wanted)), threads_for(k))
    return grad_decay, grad_bonus, grad_k, grad_v, grad_first


@wkv4_backward.register_fake
def _(
    grad_y: Tensor,
    grad_state: Tensor,
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        decay.new_empty(decay.shape),
        bonus.new_empty(bonus.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        grad_state.new_empty(grad_state.shape),
    )
