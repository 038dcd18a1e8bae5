"""One token of gated linear attention per row, on states that stay in a pool and change in place."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.gla import reference


@torch.library.custom_op("spikelm::gla_decode", mutates_args=("pool",))
def gla_decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Plain torch form of the op, any device: o [B, H, V] in v's dtype; shapes as in the op."""
    with torch.autocast(q.device.type, enabled=False):
        busy = (slots >= 0).nonzero()[:, 0]
        own = slots[busy].long()
        rows = [x if x is None else x[busy].float() for x in (q, k, v, g)]
        o, state = reference.step(*rows, pool[own], scale)  # type: ignore[arg-type]
        pool[own] = state
        out = v.new_zeros(*q.shape[:2], v.shape[2])
        out[busy] = o.to(v.dtype)
    return out


@gla_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])
