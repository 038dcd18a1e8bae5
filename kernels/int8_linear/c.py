"""Integer counts times int8 weights in C (op.c, step.h) as torch custom ops for CPU tensors.

Counts may have any signed dtype and are made int8 first. What cannot be made one is refused; NaN (a model
that has gone wrong) makes its whole row NaN, as a product of floats would.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.compile import load
from spikelm.kernels.pointers import address

LAYOUTS = ("out_in", "in_out", "rows")
"""In the order of the C enumeration: for dense and for event-driven reading, and as torch holds them."""
SERIAL_BELOW = 1 << 18
"""Multiplications below which starting a second thread costs more than it saves."""
BEYOND, NOT_A_NUMBER, FRACTION = 1, 2, 4


class Struct(ctypes.Structure):
    """``struct packed_int8`` of layout.h."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("group", c_int64),
        ("groups", c_int64),
        ("layout", c_int32),
        ("finite", c_int32),
        ("weights", c_void_p),
        ("scales", c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """The compiled op.

    Raises:
        KernelError: it cannot be compiled here.
    """
    return typed(load(Path(__file__).with_name("op.c")))


def typed(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions' arguments."""
    packed = ctypes.POINTER(Struct)
    found.int8_scratch_bytes.argtypes = [packed, c_int64, c_int]
    found.int8_packed_bytes.argtypes = [packed]
    found.int8_scratch_bytes.restype = found.int8_packed_bytes.restype = c_int64
    found.int8_rows.argtypes = [packed, c_void_p, c_int64, *[c_void_p] * 4, c_int]
    found.int8_sums.argtypes = [packed, c_void_p, c_int64, *[c_void_p] * 2, c_int]
    found.int8_pack.argtypes = [packed, c_void_p, c_void_p]
    found.int8_unpack.argtypes = [packed, c_void_p]
    found.int8_counts.argtypes = [c_int64, c_void_p, c_void_p]
    found.int8_rows.restype = found.int8_sums.restype = None
    found.int8_pack.restype = found.int8_unpack.restype = None
    found.int8_counts.restype = c_int32
    found.int8_variant.restype = ctypes.c_char_p
    return found


def describe(
    outputs: int, inputs: int, group: int, layout: str, finite: bool, weights: int | None, scales: int | None
) -> Struct:
    """The C struct; ``weights`` and ``scales`` are addresses, which the caller keeps alive."""
    groups = -(-inputs // group)
    return Struct(outputs, inputs, group, groups, LAYOUTS.index(layout), int(finite), weights, scales)


def product(packed: Struct, counts: Tensor, threshold: Tensor | None, bias: Tensor | None) -> Tensor:
    """float32 [N, O] of counts [N, D], threshold [N, 1] and bias [O]."""
    whole, missing = as_int8(counts)
    y = counts.new_empty(counts.shape[0], packed.outputs, dtype=torch.float32)
    threads, scratch = _threads_and_scratch(packed, whole.shape[0])
    threshold = None if threshold is None else threshold.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    library().int8_rows(
        packed, address(whole), whole.shape[0], *map(address, (threshold, bias, y, scratch)), threads
    )
    return y if missing is None else y.masked_fill_(missing, torch.nan)


def integer_sums(packed: Struct, counts: Tensor) -> Tensor:
    """Exact inner sums, int32 [groups, N, O], of counts [N, D]; NaN counts as none."""
    whole, _ = as_int8(counts)
    sums = counts.new_empty(packed.groups, counts.shape[0], packed.outputs, dtype=torch.int32)
    threads, scratch = _threads_and_scratch(packed, whole.shape[0])
    library().int8_sums(packed, address(whole), whole.shape[0], address(sums), address(scratch), threads)
    return sums


def as_int8(counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Counts [N, D] in int8, rows one after the other, and the rows [N, 1] that hold NaN (None: none does).

    Raises:
        ShapeError: a count beyond 127, or a number that is not whole.
    """
    if counts.dtype == torch.int8:
        return counts.contiguous(), None
    exact = counts.dtype in (torch.float64, torch.int64, torch.int32)  # float32 would round these
    if exact:
        floats = counts.clamp(-1e6, 1e6).to(torch.float64)
        problems = FRACTION if bool((floats != floats.round()).logical_and(~floats.isnan()).any()) else 0
        floats = floats.round().to(torch.float32).contiguous()
    else:
        problems, floats = 0, counts.to(torch.float32).contiguous()
    whole = torch.empty(counts.shape, dtype=torch.int8)
    problems |= library().int8_counts(floats.numel(), address(floats), address(whole))
    if problems & BEYOND:
        raise ShapeError(too_large(counts))
    if problems & FRACTION:
        raise ShapeError(
            "int8_linear got counts that are no whole numbers; int8 weights want an integer neuron"
        )
    return whole, floats.isnan().any(-1, keepdim=True) if problems & NOT_A_NUMBER else None


def too_large(counts: Tensor) -> str:
    """What to say of counts beyond 127."""
    largest = float(counts.abs().nan_to_num(0.0, posinf=torch.inf).max())
    return (
        f"int8_linear got a count of magnitude {largest:g}; expected at most 127: "
        "cap the counts (the adaptive neuron does)"
    )


def plain(counts: Tensor, direct: Callable[..., Tensor], op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``direct`` for real tensors, ``op`` where torch traces: a custom op costs more than a small product."""
    traced = torch.compiler.is_compiling() or type(counts) is not Tensor
    return op if traced else direct


def int8_linear(counts: Tensor, weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """Products [N, O] in the dtype of ``scales``; arguments as those of the reference."""
    return plain(counts, _int8_linear, _int8_linear_op)(counts, weight, scales, group)


def int8_sums(counts: Tensor, weight: Tensor, group: int) -> Tensor:
    """Exact inner sums, int32 [groups, N, O]; arguments as those of the reference."""
    return plain(counts, _int8_sums, _int8_sums_op)(counts, weight, group)


def _int8_linear(counts: Tensor, weight: Tensor, scales: Tensor, group: int) -> Tensor:
    weight = weight.contiguous()
    if scales.dtype == torch.float32:
        scales = scales.contiguous()
        return product(_rows(weight, scales, group), counts, None, None)
    sums = integer_sums(_rows(weight, None, group), counts)
    y = scales.new_zeros(sums.shape[1:])
    for j in range(sums.shape[0]):
        y += sums[j].to(scales.dtype) * scales[:, j]
    return y


_int8_linear_op = torch.library.custom_op(
    "spikelm::int8_linear", _int8_linear, mutates_args=(), device_types="cpu"
)


@_int8_linear_op.register_fake
def _(counts: Tensor, weight: Tensor, scales: Tensor, group: int) -> Tensor:
    return scales.new_empty(counts.shape[0], weight.shape[0])


def _int8_sums(counts: Tensor, weight: Tensor, group: int) -> Tensor:
    weight = weight.contiguous()
    return integer_sums(_rows(weight, None, group), counts)


_int8_sums_op = torch.library.custom_op("spikelm::int8_sums", _int8_sums, mutates_args=(), device_types="cpu")


@_int8_sums_op.register_fake
def _(counts: Tensor, weight: Tensor, group: int) -> Tensor:
    groups = -(-weight.shape[1] // group)
    return counts.new_empty(groups, counts.shape[0], weight.shape[0], dtype=torch.int32)


def _rows(weight: Tensor, scales: Tensor | None, group: int) -> Struct:
    outputs, inputs = weight.shape
    return describe(outputs, inputs, group, "rows", True, address(weight), address(scales))


def _threads_and_scratch(packed: Struct, rows: int) -> tuple[int, Tensor]:
    work = packed.outputs * packed.inputs * rows
    threads = 1 if work < SERIAL_BELOW else torch.get_num_threads()
    return threads, torch.empty(library().int8_scratch_bytes(packed, rows, threads), dtype=torch.uint8)
