"""One token of the gated delta rule per row, on states that stay in a pool and change in place."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.gated_delta import reference


@torch.library.custom_op("spikelm::gated_delta_decode", mutates_args=("pool",))
def gated_delta_decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Plain torch form of the op, any device: o [B, H, V] in v's dtype; shapes as in the op."""
    with torch.autocast(q.device.type, enabled=False):
        busy = (slots >= 0).nonzero()[:, 0]
        own = slots[busy].long()
        queries = q[busy].float().unflatten(1, (k.shape[1], -1))
        rows = [x[busy].float() for x in (k, v, g, beta)]
        o, state = reference.step(queries, *rows, pool[own], scale)
        pool[own] = state
        out = v.new_zeros(*q.shape[:2], v.shape[2])
        out[busy] = o.flatten(1, 2).to(v.dtype)
    return out


@gated_delta_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])
