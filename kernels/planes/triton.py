"""Bit planes of counts in Triton: kernels, torch ops, configurations shipped. Layout as in reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.ahead import Compilation

BLOCK = 256  # bytes of a plane per program


@triton.jit(do_not_specialize=["rows", "width", "octets"])
def expand_planes_kernel(
    counts_ptr,  # int8 [N, D]
    packed_ptr,  # uint8 [PLANES + 1, N, octets]
    rows,
    width,
    octets,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of lanes reads the eight channels of a byte once and writes the byte of every plane."""
    size = rows.to(tl.int64) * octets
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = byte // octets
    bit = tl.arange(0, 8)[None, :]
    channel = ((byte - row * octets) * 8)[:, None] + bit
    inside = (byte < size)[:, None] & (channel < width)
    count = tl.load(counts_ptr + row[:, None] * width + channel, mask=inside, other=0).to(tl.int32)
    magnitude = tl.abs(count)
    sign = tl.sum(tl.where(count < 0, 1, 0) << bit, 1)
    tl.store(packed_ptr + byte, sign.to(tl.uint8), mask=byte < size)
    for plane in tl.static_range(PLANES):
        bits = tl.sum(((magnitude >> plane) & 1) << bit, 1)
        tl.store(packed_ptr + (plane + 1) * size + byte, bits.to(tl.uint8), mask=byte < size)


@triton.jit(do_not_specialize=["rows", "width", "octets"])
def collapse_planes_kernel(
    packed_ptr,  # uint8 [PLANES + 1, N, octets]
    counts_ptr,  # int8 [N, D]
    rows,
    width,
    octets,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of lanes reads the byte of every plane and writes its eight channels."""
    size = rows.to(tl.int64) * octets
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = byte // octets
    bit = tl.arange(0, 8)[None, :]
    channel = ((byte - row * octets) * 8)[:, None] + bit
    inside = (byte < size)[:, None] & (channel < width)
    sign = tl.load(packed_ptr + byte, mask=byte < size, other=0).to(tl.int32)
    magnitude = tl.zeros([BLOCK, 8], tl.int32)
    for plane in tl.static_range(PLANES):
        bits = tl.load(packed_ptr + (plane + 1) * size + byte, mask=byte < size, other=0).to(tl.int32)
        magnitude += ((bits[:, None] >> bit) & 1) << plane
    count = tl.where(((sign[:, None] >> bit) & 1) != 0, -magnitude, magnitude)
    tl.store(counts_ptr + row[:, None] * width + channel, count.to(tl.int8), mask=inside)


@torch.library.custom_op("spikelm::expand_planes_triton", mutates_args=())
def expand_planes(counts: Tensor, planes: int) -> Tensor:
    """uint8 [planes + 1, .., ceil(D / 8)] of counts int8 [.., D]. High bits of larger counts are lost."""
    width = counts.shape[-1]
    octets = -(-width // 8)
    packed = counts.new_empty((planes + 1, *counts.shape[:-1], octets), dtype=torch.uint8)
    size = packed.numel() // (planes + 1)
    if size:
        with torch.cuda.device_of(counts):
            expand_planes_kernel[(-(-size // BLOCK),)](
                counts.contiguous(), packed, size // octets, width, octets, PLANES=planes, BLOCK=BLOCK
            )
    return packed


@expand_planes.register_fake
def _(counts: Tensor, planes: int) -> Tensor:
    return counts.new_empty((planes + 1, *counts.shape[:-1], (counts.shape[-1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("spikelm::collapse_planes_triton", mutates_args=())
def collapse_planes(packed: Tensor, width: int) -> Tensor:
    """Counts int8 [.., width] of uint8 [planes + 1, .., ceil(width / 8)]."""
    planes, octets = packed.shape[0] - 1, packed.shape[-1]
    counts = packed.new_empty((*packed.shape[1:-1], width), dtype=torch.int8)
    size = packed.numel() // packed.shape[0]
    if size:
        with torch.cuda.device_of(packed):
            collapse_planes_kernel[(-(-size // BLOCK),)](
                packed.contiguous(), counts, size // octets, width, octets, PLANES=planes, BLOCK=BLOCK
            )
    return counts


@collapse_planes.register_fake
def _(packed: Tensor, width: int) -> Tensor:
    return packed.new_empty((*packed.shape[1:-1], width), dtype=torch.int8)


def compilations(target: str) -> list[Compilation]:
    """The shipped configurations: the fewest, usual and most planes."""
    types = {
        "counts_ptr": "*i8",
        "packed_ptr": "*u8",
        "rows": "i32",
        "width": "i32",
        "octets": "i32",
    }
    return [
        Compilation(
            kernel=kernel,
            name=f"{kernel.__name__.removesuffix('_kernel')}[{planes}]",
            signature=types,
            constants={"PLANES": planes, "BLOCK": BLOCK},
        )
        for kernel in (expand_planes_kernel, collapse_planes_kernel)
        for planes in (1, 4, 7)
    ]
