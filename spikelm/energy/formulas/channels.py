"""Channels: activations, gates and routing; their matrices are projections."""

from __future__ import annotations

from spikelm.channels.mlp import MLP
from spikelm.channels.moe import MoE
from spikelm.channels.rwkv import RWKVChannel
from spikelm.channels.swiglu import SwiGLU
from spikelm.energy.activity import Activity
from spikelm.energy.counts import Kinds, Operations, macs
from spikelm.energy.formulas.elementary import SIGMOID, SILU, gated, norm, shift
from spikelm.energy.operations import operations

RELU = Operations(comparisons=1, values=2)
SQUARED_RELU = RELU + Operations(multiplications=1)


@operations.register
def _(part: RWKVChannel, activity: Activity) -> Kinds:
    """RWKV-4 (arXiv 2305.13048, equations 19 to 21): two mixtures, relu(k)^2, sigmoid(r) * v."""
    D = part.hidden_size
    return {
        "shift": shift(D, 2),
        "activation": part.key.out_features * SQUARED_RELU,
        "gate": gated(D),
    }


@operations.register
def _(part: SwiGLU, activity: Activity) -> Kinds:
    """silu(gate) * up (arXiv 2002.05202, equation 6)."""
    return {"gate": part.hidden * (SILU + Operations(multiplications=1, values=3))}


@operations.register
def _(part: MLP, activity: Activity) -> Kinds:
    """A norm and an activation behind ``up`` (arXiv 2209.15425)."""
    hidden = part.up.out_features
    kinds = {"norm": norm(part.up_norm)}
    if part.activation != "none":
        each = RELU if part.activation == "relu" else SQUARED_RELU
        kinds["activation"] = hidden * each
    return kinds


@operations.register
def _(part: MoE, activity: Activity) -> Kinds:
    """Routing and the weighted sum (see :mod:`spikelm.channels.routing` for the sources).

    Softmax: E each of comparisons, subtractions, exponentials, additions, divisions; sigmoid: E of those.
    A bias: E additions. Choice: k passes over E scores. Weights: k additions and k divisions where they are
    normalised, k multiplications with a scale that is not 1. Sum: k D multiply-accumulates, and D additions
    for every shared expert.
    """
    E, k, D = len(part.experts), part.top_k, part.hidden_size
    if part.kind == "softmax":
        scores = E * Operations(comparisons=1, additions=2, exponentials=1, divisions=1)
    else:
        scores = E * SIGMOID
    choice = Operations(comparisons=k * E, additions=0 if part.expert_bias is None else E)
    weights = Operations(
        additions=k if part.normalise else 0,
        divisions=k if part.normalise else 0,
        multiplications=0 if part.scale == 1.0 else k,
    )
    summed = macs(k * D, additions=len(part.shared) * D, values=(k + len(part.shared) + 1) * D)
    return {"routing": scores + choice + weights + summed}
