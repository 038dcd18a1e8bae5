"""y_n = sum over the channels i that fired of x_ni w_i, as the equation says it."""

from __future__ import annotations

import torch
from torch import Tensor


def event_linear(x: Tensor, wt: Tensor) -> Tensor:
    """Products [N, O] of x [N, D] and wt [D, O], one channel after the other, in float32 or float64."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.zeros(x.shape[0], wt.shape[1], dtype=kind, device=x.device)
    for i in (x != 0).any(0).nonzero()[:, 0].tolist():
        y += x[:, i, None].to(kind) * wt[i].to(kind)
    return y.to(x.dtype)
