"""Our GPU kernels under the canonical calls of an independent side-by-side harness (state None: zeros)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.gla import gla as _gla
from spikelm.kernels.gla import gla_decode as _gla_decode


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated linear attention, [B, T, H, *] with log gates [B, T, H, K]."""
    if initial_state is None:
        initial_state = torch.zeros(k.shape[0], *k.shape[2:], v.shape[3], device=k.device)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    o, last = _gla(q, k, v, g, initial_state, scale=scale)
    return (o, last) if output_final_state else o


def gla_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """One token, [B, 1, H, *]; the state [B, H, K, V] is a pool with row b in slot b and changes in place."""
    if initial_state is None:
        initial_state = torch.zeros(k.shape[0], *k.shape[2:], v.shape[3], device=k.device)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    slots = torch.arange(len(k), device=k.device)
    o = _gla_decode(q[:, 0], k[:, 0], v[:, 0], g[:, 0], initial_state, slots, scale=scale)[:, None]
    return (o, initial_state) if output_final_state else o
