"""Adaptive spike encoding in C (op.c) as torch custom ops for CPU tensors, float32 or float64."""

from __future__ import annotations

from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.pointers import address, threads_for

STATISTICS = 4  # figures of a row, as in step.h


@cache
def _library(dtype: torch.dtype) -> CDLL:
    library = load(Path(__file__).with_name("op.c"), ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    sizes, options = [c_int64] * 2, [c_double] * 3
    library.encode_forward.argtypes = [*sizes, *options, *[c_void_p] * 6, c_int]
    library.encode_forward.restype = c_int64
    library.encode_int8.argtypes = [*sizes, *options, *[c_void_p] * 5, c_int]
    library.decode_counts.argtypes = [*sizes, *[c_void_p] * 3, c_int]
    library.encode_mask.argtypes = [*sizes, c_double, *[c_void_p] * 5, c_int]
    library.encode_backward.argtypes = [*sizes, *[c_void_p] * 5, c_int]
    library.encode_int8.restype = library.decode_counts.restype = None
    library.encode_mask.restype = library.encode_backward.restype = None
    return library


def forward(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    given = None if mean is None else mean.contiguous()
    results = map(address, (x, given, counts, threshold, quiet, slots))
    clipped_rows = library.encode_forward(*sizes, k, dead_zone, cap, *results, threads)
    mask = x.new_empty(clipped_rows, width, dtype=torch.uint8)
    if clipped_rows:
        library.encode_mask(*sizes, cap, *map(address, (x, threshold, quiet, slots, mask)), threads)
    return counts, threshold, slots, mask


encode_forward = torch.library.custom_op(
    "spikelm::encode_forward", forward, mutates_args=(), device_types="cpu"
)


@encode_forward.register_fake
def _(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def int8(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int8 [.., D], threshold [.., 1] and statistics int64 [.., 4] of x [.., D]."""
    x = x.contiguous()
    counts = torch.empty_like(x, dtype=torch.int8)
    threshold = x.new_empty(*x.shape[:-1], 1)
    statistics = x.new_empty(*x.shape[:-1], STATISTICS, dtype=torch.int64)
    given = None if mean is None else mean.contiguous()
    pointers = map(address, (x, given, counts, threshold, statistics))
    _library(x.dtype).encode_int8(
        threshold.numel(), x.shape[-1], k, dead_zone, cap, *pointers, threads_for(x)
    )
    return counts, threshold, statistics


encode_int8 = torch.library.custom_op("spikelm::encode_int8", int8, mutates_args=(), device_types="cpu")


@encode_int8.register_fake
def _(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(*x.shape[:-1], 1),
        x.new_empty(*x.shape[:-1], STATISTICS, dtype=torch.int64),
    )


def decode(counts: Tensor, threshold: Tensor) -> Tensor:
    """counts int8 [.., D] times threshold [.., 1]."""
    counts, threshold = counts.contiguous(), threshold.contiguous()
    y = torch.empty_like(counts, dtype=threshold.dtype)
    pointers = map(address, (counts, threshold, y))
    _library(y.dtype).decode_counts(threshold.numel(), counts.shape[-1], *pointers, threads_for(y))
    return y


decode_int8 = torch.library.custom_op("spikelm::decode_int8", decode, mutates_args=(), device_types="cpu")


@decode_int8.register_fake
def _(counts: Tensor, threshold: Tensor) -> Tensor:
    return threshold.new_empty(counts.shape)
