"""Fused norm, token shift and encode in C (op.c) as a torch custom op for CPU tensors, float32 or float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import CDLL, POINTER, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.pointers import address, contiguous_mask, runs_directly, threads_for
from spikelm.kernels.shift_encode.options import Norm, Options

STATISTICS = 4  # figures of a row, as in encode/step.h


class _Op(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64),
        ("steps", c_int64),
        ("width", c_int64),
        ("mixes", c_int64),
        ("epsilon", c_double),
        ("k", POINTER(c_double)),
        ("dead_zone", POINTER(c_double)),
        ("cap", POINTER(c_double)),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("mix", c_void_p),
        ("rms", c_int32),
        ("pad", c_int32),
    )


@cache
def _library(dtype: torch.dtype) -> CDLL:
    library = load(Path(__file__).with_name("op.c"), ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    library.shift_encode.argtypes = [POINTER(_Op), *[c_void_p] * 9, c_int]
    library.shift_encode.restype = None
    return library


def run(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    last: Tensor,
    mixes: Tensor,
    k: Sequence[float],
    dead_zone: Sequence[float],
    cap: Sequence[float],
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts [M, B, T, D], thresholds [M, B, T, 1], last [B, D], statistics [M, B, T, 4] of x [B, T, D]."""
    x, last, mixes, norm_weight = (given.contiguous() for given in (x, last, mixes, norm_weight))
    norm_bias = None if norm_bias is None else norm_bias.contiguous()
    reset, valid = contiguous_mask(reset), contiguous_mask(valid)
    rows, steps, width = x.shape
    count, threads = mixes.shape[0], threads_for(x)
    counts = x.new_empty(count, rows, steps, width, dtype=torch.int8)
    thresholds = x.new_empty(count, rows, steps, 1)
    statistics = x.new_empty(count, rows, steps, STATISTICS, dtype=torch.int64)
    new_last, scratch = torch.empty_like(last), x.new_empty(threads, 3, width)
    options = [(c_double * count)(*values) for values in (k, dead_zone, cap)]
    vectors = map(address, (norm_weight, norm_bias, mixes))
    op = _Op(rows, steps, width, count, eps, *options, *vectors, rms, 0)
    given = (x, last, reset, valid, scratch, counts, thresholds, statistics, new_last)
    _library(x.dtype).shift_encode(op, *map(address, given), threads)
    return counts, thresholds, new_last, statistics


shift_encode_op = torch.library.custom_op("spikelm::shift_encode", run, mutates_args=(), device_types="cpu")


@shift_encode_op.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    last: Tensor,
    mixes: Tensor,
    k: Sequence[float],
    dead_zone: Sequence[float],
    cap: Sequence[float],
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (mixes.shape[0], *x.shape[:2])
    return (
        x.new_empty(*shape, x.shape[2], dtype=torch.int8),
        x.new_empty(*shape, 1),
        last.new_empty(last.shape),
        x.new_empty(*shape, STATISTICS, dtype=torch.int64),
    )


def shift_encode(
    x: Tensor,
    norm: Norm,
    last: Tensor,
    mixes: Tensor,
    options: Options,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The public op's call."""
    call = run if runs_directly(x, norm.weight, norm.bias, last, mixes, reset, valid) else shift_encode_op
    counts, thresholds, new_last, statistics = call(
        x,
        norm.weight,
        norm.bias,
        norm.eps,
        norm.kind == "rmsnorm",
        last,
        mixes,
        list(options.k),
        list(options.dead_zone),
        [float(cap) for cap in options.cap],
        reset,
        valid,
    )
    return counts, thresholds, new_last, statistics
