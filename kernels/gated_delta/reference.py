"""The gated delta rule as a loop over tokens, differentiated by autograd: the specification.

Per token and kv head, with log decay g <= 0, write strength beta, key k, value v and query q (rows)::

    S <- exp(g) S
    S <- S + beta k^T (v - k S)        (what S already says about k is replaced by v, by a share beta)
    o  = scale q S

in one line S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t. Every query head of a group
reads the one state of its key-value head. Where ``reset`` is set the state is first emptied; where ``valid``
is not, the state stays (after a reset, if any) and o = 0. Sources: Yang et al. 2024 (Gated DeltaNet),
https://arxiv.org/abs/2412.06464, equation 10; Schlag et al. 2021 (the delta rule as a fast weight),
https://arxiv.org/abs/2102.11174.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, G, n, V] and state [B, G, K, V] of q [B, T, G, n, K]; one floating dtype."""
    if valid is not None:
        # What stands at an invalid token (it may be NaN) stays out of every value and gradient.
        q = torch.where(valid[..., None, None, None], q, 0.0)
        k, v = (torch.where(valid[..., None, None], x, 0.0) for x in (k, v))
        g, beta = (torch.where(valid[..., None], x, 0.0) for x in (g, beta))
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0.0, state)
        o, new = step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, scale)
        if valid is not None:
            new = torch.where(valid[:, t, None, None, None], new, state)
        state = new
        outputs.append(o)
    return (torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:-1], v.shape[-1])), state


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: output [B, G, n, V] and new state of q [B, G, n, K], k [B, G, K], v [B, G, V], g [B, G]."""
    state = torch.exp(g)[..., None, None] * state
    known = (k[..., :, None] * state).sum(-2)
    state = state + k[..., :, None] * (beta[..., None] * (v - known))[..., None, :]
    return scale * (q @ state), state
