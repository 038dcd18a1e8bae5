"""Gated linear attention as a loop over tokens, differentiated by autograd: the specification.

Per token and key-value head, with log gates g <= 0 and a state S [K, V]::

    S <- diag(exp g) S + k^T v
    o = scale * q S          for each of the n query heads that share the head

Where ``reset`` is set the state is first emptied; where ``valid`` is not, the state stays and o = 0. Source:
Yang et al. 2023 (GLA), https://arxiv.org/abs/2312.06635, equation 3 with alpha = exp g; used by SpikingBrain,
https://arxiv.org/abs/2509.05276.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and state [B, G, K, V]; shapes as in the op, one floating dtype."""
    q, k, v, g = hide_invalid(q, k, v, g, valid)
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0.0, state)
        o, new = step(q[:, t], k[:, t], v[:, t], None if g is None else g[:, t], state, scale)
        if valid is not None:
            o = torch.where(valid[:, t, None, None], o, 0.0)
            new = torch.where(valid[:, t, None, None, None], new, state)
        state = new
        outputs.append(o)
    return (torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1])), state


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Token: o [B, H, V] and the new state, of q [B, H, K], k [B, G, K], v [B, G, V], g [B, G, K or 1]."""
    if g is not None:
        state = torch.exp(g)[..., None] * state
    state = state + k[..., :, None] * v[..., None, :]
    heads, groups = q.shape[1], k.shape[1]
    o = scale * q.unflatten(1, (groups, heads // groups)) @ state  # query head h reads key head h // n
    return o.flatten(1, 2), state


def hide_invalid(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Zeros where ``valid`` is false: what stands there (it may be NaN) stays out of values and gradients."""
    if valid is None:
        return q, k, v, g
    here = valid[:, :, None, None]
    q, k, v = (torch.where(here, x, 0.0) for x in (q, k, v))
    return q, k, v, None if g is None else torch.where(here, g, 0.0)
