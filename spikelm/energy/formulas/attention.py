"""Mixers that attend: swa, attention, ssa, sdsa, and parallel branches."""

from __future__ import annotations

from typing import cast

from torch import nn

from spikelm.energy.activity import Activity
from spikelm.energy.counts import Kinds, Operations, macs
from spikelm.energy.formulas.elementary import gated, norm, rotated, shift
from spikelm.energy.operations import operations
from spikelm.mixers.attention import Attention
from spikelm.mixers.parallel import Parallel
from spikelm.mixers.sdsa import SDSA
from spikelm.mixers.softmax import SoftmaxMixer
from spikelm.mixers.spiking_attention import SpikingAttention
from spikelm.mixers.ssa import SSA
from spikelm.mixers.swa import SlidingWindowAttention
from spikelm.neurons.base import Neuron


def _softmax(part: SoftmaxMixer, seen: float) -> Kinds:
    """Softmax attention of H heads of d features over n keys, sinks included.

    Scores: H d n multiply-accumulates and H n multiplications with d^-1/2. Weights: H n each of comparisons
    (the maximum), subtractions, exponentials and additions (the sum). Values: H d n multiply-accumulates,
    H d divisions by the sum (kernels/plan: the weights are not normalised one by one).
    """
    d = part.head_dim
    H, G = part.query.out_features // d, part.key.out_features // d
    n = seen + part.sinks
    scores = macs(H * d * n, multiplications=H * n)
    weights = H * n * Operations(comparisons=1, additions=2, exponentials=1)
    summed = macs(H * d * n, divisions=H * d)
    kinds = {
        "norm": norm(part.query_norm, H) + norm(part.key_norm, G),
        "rotation": rotated(part.rope, H + G),
        "attention": scores + weights + summed + Operations(values=2 * (H + G) * d),
    }
    if isinstance(part.output_gate, nn.Module):
        kinds["gate"] = gated(H * d)
    return kinds


@operations.register
def _(part: SlidingWindowAttention, activity: Activity) -> Kinds:
    """The newest ``window`` tokens; the number of keys is the mean over the tokens that were read."""
    return _softmax(part, activity.keys(part.window))


@operations.register
def _(part: Attention, activity: Activity) -> Kinds:
    """All tokens so far; the number of keys is the mean over the tokens that were read."""
    return _softmax(part, activity.keys())


def _spiking(part: SpikingAttention, activity: Activity, reads: bool) -> dict[str, Operations]:
    """M <- a M + k^T v and o = q M over H heads of K key and V value channels, then mean and scale.

    Dense: H K V multiply-accumulates to write, as many to read. Where queries, keys and values are spikes, a
    pair that fired is an addition and the rest nothing: what was measured. A decay: H K V multiplications.
    Mean: H additions (and H multiplications with a decay), H V divisions. A scale: H V multiplications.
    """
    H, V, K = part.num_heads, part.head_dim, part._key_dim()
    width = H * V
    spiking = cast(Neuron, part.get_submodule(f"{part.inputs[0]}_neuron")).spiking
    dense = H * K * V * (2 if reads else 1)
    if spiking:
        pairs = activity.pairs[part.path]
        events = pairs.added + (pairs.gathered if reads else 0.0)
        sums = Operations(dense_macs=dense, effective_macs=events, accumulates=events)
    else:
        sums = macs(dense)
    decays = part.decay is not None
    after = Operations(
        multiplications=(H * K * V + (H if part.mean else 0) if decays else 0)
        + (0 if part.scale == 1.0 else width),
        additions=H if part.mean else 0,
        divisions=width if part.mean else 0,
        values=4 * width,
    )
    norms = sum((norm(part.get_submodule(f"{name}_norm")) for name in part.inputs), Operations())
    kinds = {"recurrence": sums + after, "norm": norms}
    if part.token_shift:
        kinds["shift"] = shift(part.hidden_size, len(part.inputs))
    return kinds


@operations.register
def _(part: SSA, activity: Activity) -> Kinds:
    """Spikformer (arXiv 2209.15425, equations 4 to 6)."""
    return _spiking(part, activity, reads=True)


@operations.register
def _(part: SDSA, activity: Activity) -> Kinds:
    """Spike-driven attention (arXiv 2307.01694, equation 10; arXiv 2404.03663): a sum per channel, K = 1.

    Reading it is no operation. The masks are ANDs of single bits, which are free, where there are spikes;
    else multiplications: of k and v (version 1), and of what was read with q or v.
    """
    kinds = _spiking(part, activity, reads=False)
    if not cast(Neuron, part.get_submodule(f"{part.inputs[0]}_neuron")).spiking:
        width = part.num_heads * part.head_dim
        kinds["gate"] = Operations(multiplications=width * (2 if part.version == 1 else 1), values=3 * width)
    return kinds


@operations.register
def _(part: Parallel, activity: Activity) -> Kinds:
    """sum_i w_i RMSNorm(branch_i): a norm and D multiplications for each, D additions between them."""
    branches = len(part.names)
    norms = [part.get_submodule(f"norm{index}") for index in range(branches)]
    D = cast(nn.RMSNorm, norms[0]).normalized_shape[-1]
    return {
        "norm": sum((norm(module) for module in norms), Operations()),
        "residual": D * Operations(multiplications=branches, additions=branches - 1, values=2 * branches),
    }
