"""Spike counts as packed bit planes: one bit per channel for the sign and for each bit of the magnitude.

What event-driven hardware and bitwise codings read, and an eighth of a byte per channel and plane to store.
Forms: reference.py (bit by bit), eager.py (plain torch), c.py and op.c (CPUs), triton.py (GPUs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import choose
from spikelm.kernels.planes import c, eager, reference

__all__ = ["MOST_PLANES", "collapse_planes", "expand_planes"]

MOST_PLANES = 7
"""Magnitude bits of a count up to 127."""


def _expand_triton(counts: Tensor, planes: int) -> Tensor:
    from spikelm.kernels.planes import triton

    packed: Tensor = triton.expand_planes(counts, planes)
    return packed


def _collapse_triton(packed: Tensor, width: int) -> Tensor:
    from spikelm.kernels.planes import triton

    counts: Tensor = triton.collapse_planes(packed, width)
    return counts


_Expand = Callable[[Tensor, int], Tensor]
_Collapse = Callable[[Tensor, int], Tensor]
_EXPAND: Mapping[str, _Expand] = MappingProxyType(
    {
        "reference": reference.expand_planes,
        "torch": eager.expand_planes,
        "c": c.expand_planes,
        "triton": _expand_triton,
    }
)
_COLLAPSE: Mapping[str, _Collapse] = MappingProxyType(
    {
        "reference": reference.collapse_planes,
        "torch": eager.collapse_planes,
        "c": c.collapse_planes,
        "triton": _collapse_triton,
    }
)


def expand_planes(counts: Tensor, planes: int) -> Tensor:
    """Bit planes of counts: the signs, then the bits of |count| from the least significant one.

    Args:
        counts: int8 [.., D] with |count| < 2^planes. On CPUs a larger one is refused; on other devices and
            under torch.compile its high bits are lost, because a look at the values would stop the queue.
        planes: magnitude bits, from 1 to 7.

    Returns:
        uint8 [planes + 1, .., ceil(D / 8)]; bit i of byte j is channel 8 j + i, bits beyond D are 0. Plane 0
        is 1 where the count is negative, plane 1 + b is bit b of |count|.

    Raises:
        ShapeError: counts are a scalar or not int8.
        KernelError: ``planes`` out of range, a count that they do not hold, or a back-end that was asked for
            and is not available.
    """
    _check_expand(counts, planes)
    return _EXPAND[choose("planes", counts.device, kernel="expand")](counts, planes)


def collapse_planes(packed: Tensor, width: int) -> Tensor:
    """The counts of bit planes: what :func:`expand_planes` was given.

    Args:
        packed: uint8 [planes + 1, .., ceil(width / 8)], the signs first; bits beyond ``width`` do not matter.
        width: D, channels of a row.

    Returns:
        counts int8 [.., D]; a sign bit where the magnitude is 0 does not matter.

    Raises:
        ShapeError: a shape or dtype that does not fit.
        KernelError: a back-end that was asked for and is not available.
    """
    _check_collapse(packed, width)
    return _COLLAPSE[choose("planes", packed.device, kernel="collapse")](packed, width)


def _check_expand(counts: Tensor, planes: int) -> None:
    if counts.dim() == 0 or counts.dtype != torch.int8:
        raise ShapeError(f"expand_planes needs int8 counts [.., D], got {counts.dtype} {list(counts.shape)}")
    if not 1 <= planes <= MOST_PLANES:
        raise KernelError(
            f"expand_planes got {planes} planes; expected from 1 to {MOST_PLANES} (int8 counts)"
        )


def _check_collapse(packed: Tensor, width: int) -> None:
    sizes = packed.shape
    if (
        packed.dtype != torch.uint8
        or len(sizes) < 2
        or not 2 <= sizes[0] <= MOST_PLANES + 1
        or width < 0
        or sizes[-1] != (width + 7) // 8
    ):
        raise ShapeError(
            f"collapse_planes needs uint8 [2 to {MOST_PLANES + 1}, .., {(max(width, 0) + 7) // 8}] for "
            f"{width} channels, got {packed.dtype} {list(packed.shape)}"
        )
