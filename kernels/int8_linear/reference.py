"""Integer counts times int8 weights as the equation says it, in integer arithmetic.

    y_o = sum over groups j of s_oj * (sum over i in group j of n_i W_oi)

The inner sum is one of whole numbers and exact; the outer one is of floats and runs from the first group to
the last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def int8_linear(counts: Tensor, weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """Products [N, O] in the dtype of ``scales``.

    Args:
        counts: [N, D], whole numbers from -127 to 127 of any dtype.
        weight: int8 [O, D].
        scales: float32 or float64 [O, ceil(D / group)].
        group: inputs that share a scale; the last group may be shorter.
    """
    whole = counts.to(torch.int64)
    y = torch.zeros(counts.shape[0], weight.shape[0], dtype=scales.dtype, device=counts.device)
    for j in range(scales.shape[1]):
        inputs = slice(j * group, (j + 1) * group)
        sums = (whole[:, None, inputs] * weight[None, :, inputs].to(torch.int64)).sum(-1)  # below 2^31
        y = y + scales[:, j] * sums.to(scales.dtype)
    return y
