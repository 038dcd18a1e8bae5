"""Integer counts times int8 weights in plain torch, as exact as the reference and in the same order.

A matrix product of whole numbers in float32 is exact, whatever the order of its sums, as long as no partial
sum can reach 2^24: up to EXACT terms of 127 * 127. Longer sums are taken in pieces whose results are added
in float64. So the product of a row has the same bits in any batch and with any number of threads. What is not
exact (the scales) is multiplied and added element by element, group after group; multiplication and addition
are separate operations, because a fused one rounds differently and is used in some places of a vectorised
loop and not in others.

``torch._int_mm`` would need no conversion of the weights. On CPUs without int8 dot products (VNNI) it is a
scalar loop, 20 to 30 times slower than this; it is used on CUDA devices, where it runs on tensor cores.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
"""Largest magnitude of a count and of a weight."""
EXACT = (2**24 - 1) // LARGEST**2
"""Terms of a sum that float32 holds exactly: 1040."""
BLOCK = 1 << 20
"""Weights that are converted at a time: float32 copies of them stay in the cache."""


def int8_linear(counts: Tensor, weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """Products [N, O]; arguments as those of the reference."""
    if counts.device.type == "cuda":
        # Saturated, because a conversion would wrap around.
        counts = counts.clamp(-LARGEST, LARGEST).to(torch.int8)
    else:
        counts = counts.to(torch.float32)
    y = torch.zeros(counts.shape[0], weight.shape[0], dtype=scales.dtype, device=counts.device)
    rows = max(1, BLOCK // max(weight.shape[1], 1))
    for first in range(0, weight.shape[0], rows):
        outputs = slice(first, first + rows)
        block, into = weight[outputs], y[:, outputs]
        if counts.device.type != "cuda":
            block = block.to(torch.float32)
        for j in range(scales.shape[1]):
            inputs = slice(j * group, (j + 1) * group)
            into += _sums(counts[:, inputs], block[:, inputs]).to(scales.dtype) * scales[outputs, j]
    return y


def integer_sums(counts: Tensor, weight: Tensor, group: int) -> Tensor:
    """The inner sums alone, int32 [groups, N, O]."""
    pieces = range(0, weight.shape[1], group)
    return torch.stack(
        [
            _sums(counts[:, first : first + group].float(), weight[:, first : first + group].float())
            for first in pieces
        ]
    ).to(torch.int32)


def _sums(counts: Tensor, weight: Tensor) -> Tensor:
    """counts [N, D] times weight [O, D], exact: float32 where it can hold the sums, else float64 or int32."""
    if counts.dtype == torch.int8:
        if _tensor_cores(weight):
            # At least 17 rows are wanted.
            padded = torch.nn.functional.pad(counts, (0, 0, 0, max(0, 17 - counts.shape[0])))
            return torch._int_mm(padded.contiguous(), weight.contiguous().t())[: counts.shape[0]]
        counts, weight = counts.to(torch.float32), weight.to(torch.float32)
    width = counts.shape[1]
    if width <= EXACT:
        return counts @ weight.t()
    total = torch.zeros(counts.shape[0], weight.shape[0], dtype=torch.float64, device=counts.device)
    for first in range(0, width, EXACT):
        total += counts[:, first : first + EXACT] @ weight[:, first : first + EXACT].t()
    return total


def _tensor_cores(weight: Tensor) -> bool:
    """Whether ``torch._int_mm`` takes this matrix on a CUDA device."""
    return weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0 and weight.numel() > 0
