"""Our ops under the call signatures of an independent harness: what it names as OP:MODULE:FUNC.

    PATH_TO_HARNESS --ops gla,gla_decode,wkv4,lif,encode,spmv
        --candidate wkv4:benchmarks.gpu_candidates:wkv4@spikelm ...

Inputs are [B, T, C]; a harness measures forward, and backward through autograd, on its own inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels import encode as encode_op
from spikelm.kernels import gla as gla_op
from spikelm.kernels import lif as lif_op
from spikelm.kernels import wkv4 as wkv4_op
from spikelm.kernels.event_linear import event_linear


def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-4's wkv; decay exp(-exp(w)), state [B, 3, 1, C] = (num, den, max)."""
    y, last = wkv4_op.wkv4(w, u, k, v, state.squeeze(2))
    return y, last.unsqueeze(2)


def lif(x: Tensor, beta: float, theta: float, reset: str, alpha: float) -> Tensor:
    """Spikes of h = beta v + x >= theta, with a soft or hard reset and the arctan surrogate."""
    batch, _, channels = x.shape
    v0 = torch.zeros(batch, channels, device=x.device)
    rate = torch.full((channels,), 1 - beta, device=x.device)
    spikes, _ = lif_op.lif(
        x, v0, rate, threshold=theta, soft_reset=reset == "soft", decay_input=False, alpha=alpha
    )
    return spikes


def encode(x: Tensor, k: float, smax: int) -> tuple[Tensor, Tensor]:
    """Counts round(x / V) up to smax as int8, and V = mean|x| / k of every row."""
    counts, threshold, _ = encode_op.adaptive_encode_int8(x, k=k, cap=smax)
    return counts, threshold


def spmv(x: Tensor, wt: Tensor) -> Tensor:
    """x [1, N_in] with zeros times wt [N_in, N_out], of which only the rows that x needs are read."""
    return event_linear(x, wt)


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
    o, last = gla_op.gla(q, k, v, g, initial_state, scale=scale)
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
    o = gla_op.gla_decode(q[:, 0], k[:, 0], v[:, 0], g[:, 0], initial_state, slots, scale=scale)[:, None]
    return (o, initial_state) if output_final_state else o
