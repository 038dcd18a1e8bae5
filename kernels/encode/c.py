"""Adaptive spike encoding in C (op.c) as torch custom ops for CPU tensors, float32 or float64."""

from __future__ import annotations

from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.pointers import address, threads_for


@cache
def _library(dtype: torch.dtype) -> CDLL:
    library = load(Path(__file__).with_name("op.c"), ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    sizes = [c_int64] * 2
    library.encode_forward.argtypes = [*sizes, *[c_double] * 3, *[c_void_p] * 5, c_int]
    library.encode_forward.restype = c_int64
    library.encode_mask.argtypes = [*sizes, c_double, *[c_void_p] * 5, c_int]
    library.encode_backward.argtypes = [*sizes, *[c_void_p] * 5, c_int]
    library.encode_mask.restype = library.encode_backward.restype = None
    return library


@torch.library.custom_op("spikelm::encode_forward", mutates_args=(), device_types="cpu")
def encode_forward(x: Tensor, k: float, dead_zone: float, cap: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts [.., D], threshold [.., 1], slots int32 [..] and mask uint8 [N, D].

    N rows hold a count that the cap cut off (usually none does); ``slots`` is a row's place in ``mask``, or
    -1. The mask is 1 where a count was cut.
    """
    x = x.contiguous()
    width, threads = x.shape[-1], threads_for(x)
    counts = torch.empty_like(x)
    threshold, quiet = x.new_empty(*x.shape[:-1], 1), x.new_empty(x.shape[:-1])
    slots = x.new_empty(x.shape[:-1], dtype=torch.int32)
    sizes, library = (slots.numel(), width), _library(x.dtype)
    results = map(address, (x, counts, threshold, quiet, slots))
    clipped_rows = library.encode_forward(*sizes, k, dead_zone, cap, *results, threads)
    mask = x.new_empty(clipped_rows, width, dtype=torch.uint8)
    if clipped_rows:
        library.encode_mask(*sizes, cap, *map(address, (x, threshold, quiet, slots, mask)), threads)
    return counts, threshold, slots, mask


@encode_forward.register_fake
def _(x: Tensor, k: float, dead_zone: float, cap: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clipped_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape),
        x.new_empty(*x.shape[:-1], 1),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
        x.new_empty(clipped_rows, x.shape[-1], dtype=torch.uint8),
    )


@torch.library.custom_op("spikelm::encode_backward", mutates_args=(), device_types="cpu")
def encode_backward(grad_counts: Tensor, threshold: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """Gradient of x [.., D]: grad_counts / threshold, zero where the mask is set."""
    grad_counts, threshold = grad_counts.contiguous(), threshold.contiguous()
    slots, mask = slots.contiguous(), mask.contiguous()
    grad_x = torch.empty_like(grad_counts)
    _library(grad_counts.dtype).encode_backward(
        slots.numel(),
        grad_counts.shape[-1],
        *map(address, (grad_counts, threshold, slots, mask, grad_x)),
        threads_for(grad_counts),
    )
    return grad_x


@encode_backward.register_fake
def _(grad_counts: Tensor, threshold: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    return grad_counts.new_empty(grad_counts.shape)
