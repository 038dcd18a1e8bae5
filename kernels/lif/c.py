"""Leaky integrate-and-fire in C (op.c) as torch custom ops for CPU tensors, float32 or float64."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.gates import refuse_not_finite
from spikelm.kernels.pointers import address, contiguous_mask, threads_for

# order of the C enumeration
SURROGATES = ("atan", "sigmoid", "triangle", "straight_through")
SEGMENT = 32  # steps between checkpoints, as in op.c


class _Neuron(ctypes.Structure):
    _fields_ = (
        ("threshold", c_double),
        ("v_reset", c_double),
        ("alpha", c_double),
        ("soft_reset", c_int32),
        ("decay_input", c_int32),
        ("detach_reset", c_int32),
        ("surrogate", c_int32),
    )


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = load(Path(__file__).with_name("op.c"), ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    sizes, neuron = [c_int64] * 3, [ctypes.POINTER(_Neuron)]
    library.lif_forward.argtypes = [*sizes, *neuron, *[c_void_p] * 8, c_int]
    library.lif_backward.argtypes = [*sizes, *neuron, *[c_void_p] * 11, c_int]
    library.lif_backward.restype = None
    return library


def forward(
    x: Tensor,
    v: Tensor,
    rate: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes [B, T, C], last membrane [B, C] and checkpoints [B, ceil(T / SEGMENT), C]."""
    x, v, rate = x.contiguous(), v.contiguous(), rate.contiguous()
    reset, valid = contiguous_mask(reset), contiguous_mask(valid)
    rows, steps, channels = x.shape
    spikes, last = torch.empty_like(x), torch.empty_like(v)
    checkpoints = x.new_empty(rows, -(-steps // SEGMENT), channels)
    neuron = _Neuron(
        threshold, v_reset, alpha, soft_reset, decay_input, detach_reset, SURROGATES.index(surrogate)
    )
    wrong = _library(x.dtype).lif_forward(
        rows,
        steps,
        channels,
        neuron,
        *map(address, (x, v, rate, reset, valid, spikes, last, checkpoints)),
        threads_for(x),
    )
    if wrong:
        refuse_not_finite("lif", "rate", rate)
    return spikes, last, checkpoints


lif_forward = torch.library.custom_op("spikelm::lif_forward", forward, mutates_args=(), device_types="cpu")


@lif_forward.register_fake
def _(
    x: Tensor,
    v: Tensor,
    rate: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps, channels = x.shape
    checkpoints = x.new_empty(rows, (steps + SEGMENT - 1) // SEGMENT, channels)
    return x.new_empty(x.shape), v.new_empty(v.shape), checkpoints


@torch.library.custom_op("spikelm::lif_backward", mutates_args=(), device_types="cpu")
def lif_backward(
    grad_spikes: Tensor,
    grad_v: Tensor,
    x: Tensor,
    rate: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, C], of the first membrane [B, C], and of the rate [C]."""
    grad_spikes, grad_v = grad_spikes.contiguous(), grad_v.contiguous()
    x, rate, checkpoints = x.contiguous(), rate.contiguous(), checkpoints.contiguous()
    reset, valid = contiguous_mask(reset), contiguous_mask(valid)
    rows, steps, channels = x.shape
    grad_x, grad_first, grad_rate = torch.empty_like(x), torch.empty_like(grad_v), torch.empty_like(rate)
    rate_rows = torch.empty_like(grad_v)
    neuron = _Neuron(
        threshold, v_reset, alpha, soft_reset, decay_input, detach_reset, SURROGATES.index(surrogate)
    )
    given = (x, rate, reset, valid, checkpoints, grad_spikes, grad_v)
    wanted = (grad_x, grad_first, rate_rows, grad_rate)
    _library(x.dtype).lif_backward(
        rows, steps, channels, neuron, *map(address, (*given, *wanted)), threads_for(x)
    )
    return grad_x, grad_first, grad_rate


@lif_backward.register_fake
def _(
    grad_spikes: Tensor,
    grad_v: Tensor,
    x: Tensor,
    rate: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), grad_v.new_empty(grad_v.shape), rate.new_empty(rate.shape)
