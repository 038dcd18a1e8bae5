"""The wkv recurrence of RWKV-4 as a loop over tokens, differentiated by autograd: the specification.

Per token, with decay w <= 0 and bonus u per channel::

    y = (A + exp(u + k) v) / (B + exp(u + k))
    A <- exp(w) A + exp(k) v
    B <- exp(w) B + exp(k)

A and B span hundreds of orders of magnitude, so the state holds num = A exp(-max) and den = B exp(-max)
with max the running maximum of the exponents. max only scales: it is a constant for gradients, which are
those of num and den at a fixed max. Where ``reset`` is set the state is first emptied (0, 0, -1e38); where
``valid`` is not, the state stays and y = 0. Source: Peng et al. 2023 (RWKV),
https://arxiv.org/abs/2305.13048, the WKV operator and its numerically safe form in the appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.gates import refuse_decay, refuse_not_finite

EMPTY_MAX = -1e38  # finite, so that the difference of two empty states is zero and not NaN


def initial_state(
    batch: int, channels: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """State before any token [B, 3, C]: num and den 0, max -1e38."""
    state = torch.zeros(batch, 3, channels, device=device, dtype=dtype)
    state[:, 2] = EMPTY_MAX
    return state


def refuse_gates(op: str, decay: Tensor, bonus: Tensor) -> None:
    """Refuses decays [C] that are NaN or above zero, and bonuses [C] that are not finite.

    Raises:
        GateError: naming the first one and its channel.
    """
    refuse_decay(op, "-exp(w)", decay)
    refuse_not_finite(op, "u", bonus)


def wkv4(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, C] and state [B, 3, C] of decay [C], bonus [C], k and v [B, T, C]; one floating dtype."""
    batch, steps, channels = k.shape
    empty = initial_state(batch, channels, k.device, k.dtype)
    if valid is not None:
        # What stands at an invalid token (it may be NaN) stays out of every value and gradient.
        k, v = torch.where(valid[..., None], k, 0.0), torch.where(valid[..., None], v, 0.0)
    outputs = []
    for t in range(steps):
        if reset is not None:
            state = torch.where(reset[:, t, None, None], empty, state)
        y, new = step(decay, bonus, k[:, t], v[:, t], state)
        if valid is not None:
            y = torch.where(valid[:, t, None], y, 0.0)
            new = torch.where(valid[:, t, None, None], new, state)
        state = new
        outputs.append(y)
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def step(decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: output [B, C] and new state [B, 3, C] of k and v [B, C]."""
    num, den, scale = state[:, 0], state[:, 1], state[:, 2].detach()

    top = torch.maximum(scale, bonus + k).detach()
    past, now = torch.exp(scale - top), torch.exp(bonus + k - top)
    y = (past * num + now * v) / (past * den + now)

    top = torch.maximum(scale + decay, k).detach()
    past, now = torch.exp(scale + decay - top), torch.exp(k - top)
    return y, torch.stack([past * num + now * v, past * den + now, top], 1)
