"""The event-driven product on GPUs: the kernels of int8_linear/triton_events.py with floating weights."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.int8_linear.triton_events import FLOAT_GROUP, add_parts, event_sums


@torch.library.custom_op("spikelm::event_linear_triton", mutates_args=())
def product(x: Tensor, wt: Tensor) -> Tensor:
    """x [N, D], N at most 4, times wt [D, O], of float32, bfloat16 or float16 -> [N, O] in that dtype."""
    y = torch.empty(x.shape[0], wt.shape[1], dtype=x.dtype, device=x.device)
    if y.numel() == 0 or wt.shape[0] == 0:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    add_parts(event_sums(x, wt.contiguous(), FLOAT_GROUP), y)
    return y


@product.register_fake
def _(x: Tensor, wt: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], wt.shape[1])
