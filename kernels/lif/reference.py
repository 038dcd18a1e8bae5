"""Leaky integrate-and-fire as a loop over tokens, differentiated by autograd: the specification.

Per token, with membrane v, input x, leak rate r = 1/tau and resting membrane v0::

    charge   h = v + (x - (v - v0)) r          (decay_input)
             h = v - (v - v0) r + x            (otherwise; r = 0 is integrate-and-fire)
    fire     s = 1 if h >= threshold else 0
    reset    v = v0 if s else h                (hard)
             v = h - threshold s               (soft)

Where ``reset`` is set the membrane is first put to rest; where ``valid`` is not, the membrane stays and
s = 0.
Source: Fang et al. 2021 (parametric LIF), equations 2-4; the charge-fire-reset form of SpikingJelly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.lif.neuron import Neuron
from spikelm.kernels.lif.surrogates import spike


def lif(
    x: Tensor, v: Tensor, rate: Tensor, neuron: Neuron, reset: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Spikes [B, T, C] and last membrane [B, C] of x [B, T, C], v [B, C], rate [C]; one floating dtype."""
    if valid is not None:
        # What stands at an invalid token (it may be NaN) stays out of every value and gradient.
        x = torch.where(valid[..., None], x, 0.0)
    spikes = []
    for t in range(x.shape[1]):
        if reset is not None:
            v = torch.where(reset[:, t, None], neuron.rest, v)
        s, new = step(x[:, t], v, rate, neuron)
        if valid is not None:
            s = torch.where(valid[:, t, None], s, 0.0)
            new = torch.where(valid[:, t, None], new, v)
        v = new
        spikes.append(s)
    return (torch.stack(spikes, 1) if spikes else torch.zeros_like(x)), v


def step(x: Tensor, v: Tensor, rate: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor]:
    """One token: spikes [B, C] and new membrane [B, C] of x [B, C], v [B, C], rate [C]."""
    leak = v - neuron.v_reset
    h = v + (x - leak) * rate if neuron.decay_input else v - leak * rate + x
    s = spike(h - neuron.threshold, neuron.surrogate, neuron.alpha)
    fired = s.detach() if neuron.detach_reset else s
    if neuron.soft_reset:
        return s, h - neuron.threshold * fired
    return s, h * (1 - fired) + neuron.v_reset * fired
