"""Bit planes of counts, bit by bit: the specification.

|n| = sum over b of 2^b p_b, p_b in {0, 1}; a plane packs the channels 8 j to 8 j + 7 into byte j, the first
in the lowest bit. The sign has a plane of its own (the coding ``bidirectional``: bits of |n| times the sign).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import KernelError


def expand_planes(counts: Tensor, planes: int) -> Tensor:
    """uint8 [planes + 1, .., ceil(D / 8)] of counts int8 [.., D]."""
    magnitude = counts.to(torch.int32).abs()
    check_range(magnitude, planes)
    bits = [(counts < 0).to(torch.int32), *((magnitude >> b) & 1 for b in range(planes))]
    packed = []
    for plane in bits:
        bytes_ = []
        for first in range(0, counts.shape[-1], 8):
            byte = torch.zeros_like(plane[..., 0])
            for i, channel in enumerate(range(first, min(first + 8, counts.shape[-1]))):
                byte = byte + (plane[..., channel] << i)
            bytes_.append(byte)
        packed.append(torch.stack(bytes_, -1) if bytes_ else plane)
    return torch.stack(packed).to(torch.uint8)


def collapse_planes(packed: Tensor, width: int) -> Tensor:
    """Counts int8 [.., width] of uint8 [planes + 1, .., ceil(width / 8)]."""
    whole = packed.to(torch.int32)
    counts = []
    for channel in range(width):
        bits = (whole[..., channel // 8] >> (channel % 8)) & 1
        magnitude = torch.zeros_like(bits[0])
        for b in range(1, packed.shape[0]):
            magnitude = magnitude + (bits[b] << (b - 1))
        counts.append(torch.where(bits[0] == 1, -magnitude, magnitude))
    shape = (*packed.shape[1:-1], 0)
    stacked = torch.stack(counts, -1) if counts else torch.zeros(shape, device=packed.device)
    return stacked.to(torch.int8)


def check_range(magnitude: Tensor, planes: int) -> None:
    """Refuses magnitudes that the planes do not hold, where looking at values costs no synchronisation.

    Raises:
        KernelError: naming the largest.
    """
    if magnitude.device.type != "cpu" or torch.compiler.is_compiling() or not magnitude.numel():
        return
    largest = int(magnitude.max())
    if largest >= 2**planes:
        raise KernelError(too_large(largest, planes))


def too_large(largest: int, planes: int) -> str:
    """The sentence about a count that the planes do not hold."""
    return (
        f"expand_planes got a count of magnitude {largest}; {planes} planes hold up to {2**planes - 1}: "
        "use more planes or cap the counts"
    )
