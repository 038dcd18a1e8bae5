"""The product of a projection over micro-steps: sum_t w_t (W e_t) in place of W n.

With float weights each micro-step is one product and the results are added in the memory dtype: equal to the
product of the counts up to rounding (1e-10 in float64). With int8 weights the whole numbers of a group are
added over the micro-steps BEFORE the scale is applied, so that the result has the bits of the product of the
counts. The window is the largest count that occurs: further micro-steps would be empty.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from spikelm.codings.base import Coding, needed_limit
from spikelm.errors import CodingError
from spikelm.kernels.int8_linear import scaled_sums
from spikelm.recurrence import memory_dtype
from spikelm.weights import Int8Linear


def expanded_product(linear: nn.Module, counts: Tensor, coding: Coding) -> Tensor:
    """linear(counts), one micro-step after the other.

    Args:
        linear: the weights, a linear map without bias.
        counts: whole numbers [.., D], in the dtype the weights want.
        coding: how they are sent.

    Returns:
        [.., O] in the dtype that ``linear`` gives.

    Raises:
        CodingError: the coding has no code for a count, or a gradient is asked for: events have none.
    """
    if torch.is_grad_enabled() and counts.requires_grad:
        raise CodingError(
            f"coding {coding.name!r} was asked for where gradients are recorded, and events have none; "
            "train collapsed (without a coding), run expanded under torch.no_grad()"
        )
    if isinstance(linear, Int8Linear):
        return _int8(linear, counts, coding)
    total: Tensor | None = None
    for events, weight in coding.planes(counts, needed_limit(counts)):
        product = cast(Tensor, linear(events))
        if total is None:
            dtype = product.dtype
            total = torch.zeros_like(product, dtype=memory_dtype(product))
        total += weight * product.to(total.dtype)
    return cast(Tensor, total).to(dtype)


def _int8(linear: Int8Linear, counts: Tensor, coding: Coding) -> Tensor:
    total: Tensor | None = None
    for events, weight in coding.planes(counts, needed_limit(counts)):
        sums = linear.integer_sums(events).to(torch.int64) * weight
        total = sums if total is None else total + sums
    return scaled_sums(cast(Tensor, total).to(torch.int32), linear.scales)
