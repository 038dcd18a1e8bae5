"""Bit planes of counts in C (op.c) as torch custom ops for CPU tensors."""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.compile import load
from spikelm.kernels.planes.reference import too_large
from spikelm.kernels.pointers import address, runs_directly, threads_for


@cache
def _library() -> CDLL:
    library = load(Path(__file__).with_name("op.c"))
    for function in (library.planes_expand, library.planes_collapse):
        function.argtypes = [c_int64, c_int64, c_int, c_void_p, c_void_p, c_int]
    library.planes_collapse.restype = None
    return library


def expand(counts: Tensor, planes: int) -> Tensor:
    """uint8 [planes + 1, .., ceil(D / 8)] of counts int8 [.., D]."""
    counts = counts.contiguous()
    *shape, width = counts.shape
    packed = counts.new_empty(planes + 1, *shape, (width + 7) // 8, dtype=torch.uint8)
    rows = counts.shape[:-1].numel()
    pointers = (address(counts), address(packed))
    if _library().planes_expand(rows, width, planes, *pointers, threads_for(counts)):
        raise KernelError(too_large(int(counts.int().abs().max()), planes))
    return packed


def collapse(packed: Tensor, width: int) -> Tensor:
    """Counts int8 [.., width] of uint8 [planes + 1, .., ceil(width / 8)]."""
    packed = packed.contiguous()
    counts = packed.new_empty(*packed.shape[1:-1], width, dtype=torch.int8)
    pointers = (address(packed), address(counts))
    rows, planes = packed.shape[1:-1].numel(), packed.shape[0] - 1
    _library().planes_collapse(rows, width, planes, *pointers, threads_for(counts))
    return counts


planes_expand = torch.library.custom_op("spikelm::planes_expand", expand, mutates_args=(), device_types="cpu")
planes_collapse = torch.library.custom_op(
    "spikelm::planes_collapse", collapse, mutates_args=(), device_types="cpu"
)


@planes_expand.register_fake
def _(counts: Tensor, planes: int) -> Tensor:
    *shape, width = counts.shape
    return counts.new_empty(planes + 1, *shape, (width + 7) // 8, dtype=torch.uint8)


@planes_collapse.register_fake
def _(packed: Tensor, width: int) -> Tensor:
    return packed.new_empty(*packed.shape[1:-1], width, dtype=torch.int8)


def expand_planes(counts: Tensor, planes: int) -> Tensor:
    """The public op's call."""
    return (expand if runs_directly(counts) else planes_expand)(counts, planes)


def collapse_planes(packed: Tensor, width: int) -> Tensor:
    """The public op's call."""
    return (collapse if runs_directly(packed) else planes_collapse)(packed, width)
