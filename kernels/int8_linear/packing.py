"""Int8 weights laid out for the C form, once, when a model is loaded.

Layouts (layout.h draws them):
    out_in: blocks of 64 outputs with four inputs side by side; every weight is read, in one stream.
    in_out: one run of bytes per input and 128 outputs; a row of counts reads only the runs of inputs whose
        count is not zero. Silent inputs cost nothing, the others more than in a stream.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError, nearest
from spikelm.kernels.int8_linear import c
from spikelm.kernels.memory import Arena
from spikelm.kernels.pointers import address

__all__ = ["BLOCK", "LAYOUTS", "PackedInt8", "int8_linear_packed", "packed_bytes"]

LAYOUTS = c.LAYOUTS[:2]
BLOCK = 64
"""Outputs are filled up to a multiple of this."""


class PackedInt8:
    """One matrix of int8 weights with its scales, in memory of its own (huge pages where it is large).

    It holds the only copy: :meth:`weight` and :meth:`scales` make the original tensors again.
    ``copy.deepcopy`` makes an independent one.

    Args:
        weight: int8 [O, D].
        scales: float32 [O, ceil(D / group)].
        group: inputs that share a scale, the last group may be shorter; None for one scale per output.
        layout: ``out_in`` or ``in_out``.
        arena: where the memory comes from; None for an allocation of its own.

    Attributes:
        outputs: O.
        inputs: D.
        group: as given.
        layout: as given.
        memory: uint8, all bytes: weights, then scales.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        KernelError: an unknown layout, tensors that are not on the CPU, or C that cannot be compiled here.
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        group: int | None = None,
        layout: str = "out_in",
        arena: Arena | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise KernelError(nearest("layout of int8 weights", layout, LAYOUTS))
        if weight.device.type != "cpu" or scales.device.type != "cpu":
            raise KernelError(f"int8 weights are packed on the CPU, these are on {weight.device}")
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise ShapeError(f"int8 weights are int8 [O, D], got {weight.dtype} {list(weight.shape)}")
        self.outputs, self.inputs = weight.shape
        self.group, self.layout = group, layout
        size = _size(self.inputs, group)
        expected = (self.outputs, -(-self.inputs // size))
        if scales.shape != expected or scales.dtype != torch.float32:
            raise ShapeError(f"scales are float32 {list(expected)}, got {scales.dtype} {list(scales.shape)}")
        self._finite = bool(scales.isfinite().all())
        total = packed_bytes(self.outputs, self.inputs, group, layout)
        self.memory = (arena or Arena(total)).tensor((total,), torch.uint8)
        self._scales().zero_()[:, : self.outputs] = scales.t()
        self._struct = _struct(self.memory, self.outputs, self.inputs, size, layout, self._finite)
        weight = weight.contiguous()
        c.library().int8_pack(self._struct, address(weight), address(self.memory))

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, with what fills them up."""
        return self.memory.numel()

    @property
    def pointer(self) -> int:
        """Address of ``struct packed_int8`` (layout.h); valid as long as this object lives."""
        return ctypes.addressof(self._struct)

    def weight(self) -> Tensor:
        """A new int8 [O, D], what was packed."""
        rows = torch.empty(self.outputs, self.inputs, dtype=torch.int8)
        c.library().int8_unpack(self._struct, address(rows))
        return rows

    def scales(self) -> Tensor:
        """A new float32 [O, groups], what was packed."""
        return self._scales()[:, : self.outputs].t().contiguous()

    def integer_sums(self, counts: Tensor) -> Tensor:
        """Exact inner sums, int32 [groups, .., O], of counts [.., D]."""
        sums = c.integer_sums(self._struct, counts.reshape(-1, self.inputs))
        return sums.reshape(sums.shape[0], *counts.shape[:-1], self.outputs)

    def _scales(self) -> Tensor:
        """Float32 [groups, O filled up] in the memory."""
        outputs = -(-self.outputs // BLOCK) * BLOCK
        groups = -(-self.inputs // _size(self.inputs, self.group))
        count = groups * outputs
        return self.memory[self.memory.numel() - 4 * count :].view(torch.float32).view(groups, outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are packed again: addresses mean nothing elsewhere."""
        return type(self), (self.weight(), self.scales(), self.group, self.layout)

    def __repr__(self) -> str:
        """Sizes, for ``print``."""
        return f"PackedInt8({self.outputs} x {self.inputs}, group={self.group}, {self.layout})"


def packed_bytes(outputs: int, inputs: int, group: int | None, layout: str) -> int:
    """Bytes that a packed matrix takes."""
    size = _size(inputs, group)
    filled, groups = -(-outputs // BLOCK) * BLOCK, -(-inputs // size)
    width = inputs
    if layout == "out_in" and groups:
        last = inputs - (groups - 1) * size
        width = (groups - 1) * (-(-size // 4) * 4) + -(-last // 4) * 4
    return filled * width + 4 * filled * groups


def int8_linear_packed(
    counts: Tensor, packed: PackedInt8, *, threshold: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = threshold * sum_j s_oj * (exact integer sums) + bias, without gradients.

    The same bits as :func:`int8_linear`, then ``* threshold``, then ``+ bias``, in every layout, for any
    number of rows and threads.

    Args:
        counts: [.., D], int8 or whole numbers from -127 to 127 of another signed dtype.
        packed: the weights.
        threshold: [.., 1], float32.
        bias: [O], float32.

    Returns:
        float32 [.., O].

    Raises:
        ShapeError: shapes or dtypes that do not fit, or a count beyond 127.
        KernelError: counts that are not on the CPU.
    """
    leading = counts.shape[:-1]
    if counts.dim() == 0 or counts.shape[-1] != packed.inputs or counts.dtype in (torch.bool, torch.uint8):
        raise ShapeError(
            f"int8_linear_packed needs counts [.., {packed.inputs}] of a signed dtype, "
            f"got {counts.dtype} {list(counts.shape)}"
        )
    if counts.device.type != "cpu":
        raise KernelError(f"packed int8 weights are on the CPU, the counts on {counts.device}")
    if threshold is not None and threshold.shape != (*leading, 1):
        raise ShapeError(f"threshold is {list(threshold.shape)}; expected {[*leading, 1]}")
    if bias is not None and bias.shape != (packed.outputs,):
        raise ShapeError(f"bias is {list(bias.shape)}; expected {[packed.outputs]}")
    y: Tensor = c.plain(counts, _product, _packed)(
        counts.reshape(-1, packed.inputs),
        packed.memory,
        packed.outputs,
        packed.inputs,
        _size(packed.inputs, packed.group),
        packed.layout,
        packed._finite,
        None if threshold is None else threshold.reshape(-1, 1),
        bias,
    )
    return y.view(*leading, packed.outputs)


def _product(
    counts: Tensor,
    memory: Tensor,
    outputs: int,
    inputs: int,
    group: int,
    layout: str,
    finite: bool,
    threshold: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    packed = _struct(memory, outputs, inputs, group, layout, finite)
    return c.product(packed, counts, threshold, bias)


_packed = torch.library.custom_op("spikelm::int8_packed", _product, mutates_args=(), device_types="cpu")


@_packed.register_fake
def _(
    counts: Tensor,
    memory: Tensor,
    outputs: int,
    inputs: int,
    group: int,
    layout: str,
    finite: bool,
    threshold: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return counts.new_empty(counts.shape[0], outputs, dtype=torch.float32)


def _struct(memory: Tensor, outputs: int, inputs: int, group: int, layout: str, finite: bool) -> c.Struct:
    filled = -(-outputs // BLOCK) * BLOCK
    scales = memory.data_ptr() + memory.numel() - 4 * filled * -(-inputs // group)
    return c.describe(outputs, inputs, group, layout, finite, memory.data_ptr(), scales)


def _size(inputs: int, group: int | None) -> int:
    return max(inputs if group is None else group, 1)
