"""Elementwise functions and norms in C (op.c) as torch custom ops for CPU tensors, float32."""

from __future__ import annotations

from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.pointers import address, threads_for

FUNCTIONS = ("exp", "sigmoid", "silu", "logsigmoid", "softplus")
"""In the order of the C enumeration ``unary``."""


@cache
def _library() -> CDLL:
    library = load(Path(__file__).with_name("op.c"))
    library.rowwise_unary.argtypes = [c_int64, c_int64, c_void_p, c_void_p, c_int]
    library.rowwise_lerp.argtypes = [c_int64, c_int64, *[c_void_p] * 4, c_int]
    library.rowwise_norm.argtypes = [c_int64, c_int64, c_int, c_double, *[c_void_p] * 4, c_int]
    library.rowwise_softmax.argtypes = [c_int64, c_int64, c_void_p, c_void_p, c_int]
    library.rowwise_unary.restype = library.rowwise_lerp.restype = library.rowwise_norm.restype = None
    library.rowwise_softmax.restype = None
    return library


@torch.library.custom_op("spikelm::rowwise_unary", mutates_args=(), device_types="cpu")
def unary(x: Tensor, function: int) -> Tensor:
    """A function of FUNCTIONS of every element."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _library().rowwise_unary(x.numel(), function, address(x), address(y), threads_for(x))
    return y


@unary.register_fake
def _(x: Tensor, function: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("spikelm::rowwise_lerp", mutates_args=(), device_types="cpu")
def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """start + weight (end - start) of [.., D], [.., D] and [D]."""
    start, end, weight = start.contiguous(), end.contiguous(), weight.contiguous()
    y = torch.empty_like(end)
    width = max(weight.numel(), 1)
    _library().rowwise_lerp(
        end.numel() // width, weight.numel(), *map(address, (start, end, weight, y)), threads_for(end)
    )
    return y


@lerp.register_fake
def _(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    return end.new_empty(end.shape)


@torch.library.custom_op("spikelm::rowwise_softmax", mutates_args=(), device_types="cpu")
def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension of x [.., D] with D >= 1."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    _library().rowwise_softmax(x.numel() // width, width, address(x), address(y), threads_for(x))
    return y


@softmax.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("spikelm::rowwise_norm", mutates_args=(), device_types="cpu")
def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, centred: bool) -> Tensor:
    """LayerNorm (centred) or RMSNorm over the last dimension of x [.., D]."""
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    _library().rowwise_norm(
        x.numel() // max(width, 1),
        width,
        centred,
        epsilon,
        *map(address, (x, weight, bias, y)),
        threads_for(x),
    )
    return y


@norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, centred: bool) -> Tensor:
    return x.new_empty(x.shape)
