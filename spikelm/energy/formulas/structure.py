"""The model, its blocks, projections and convolutions."""

from __future__ import annotations

from spikelm.block import Block
from spikelm.convolution import ShortConvolution
from spikelm.energy.activity import Activity
from spikelm.energy.counts import Kinds, Operations, macs
from spikelm.energy.formulas.elementary import SILU, norm
from spikelm.energy.operations import operations
from spikelm.model import SpikeLM
from spikelm.neurons.adaptive import Adaptive
from spikelm.projection import Projection
from spikelm.weights import Int8Linear


@operations.register
def _(part: SpikeLM, activity: Activity) -> Kinds:
    """The embedding is one row that is copied; norms on it and before the head."""
    D = part.config.hidden_size
    return {
        "embedding": Operations(values=2 * D),
        "norm": norm(part.embedding_norm) + norm(part.norm),
    }


@operations.register
def _(part: Block, activity: Activity) -> Kinds:
    """Two norms, two residual additions."""
    D = part.mixer_neuron.features
    return {
        "norm": norm(part.mixer_norm) + norm(part.channel_norm),
        "residual": 2 * D * Operations(additions=1, values=3),
    }


@operations.register
def _(part: Projection, activity: Activity) -> Kinds:
    """What a product of D inputs and O outputs does whatever its inputs are.

    Int8 weights: every group of inputs is scaled and added, O multiplications and O additions each. Counts:
    the sum is scaled with the threshold, O multiplications. A bias: O additions. The multiply-accumulates
    are counted from what was measured (:mod:`spikelm.energy.synapses`).
    """
    D, O = part.in_features, part.out_features  # noqa: E741 (the name of the docs)
    extra = Operations(values=D + O)
    if isinstance(part.linear, Int8Linear):
        groups = part.linear.scales.shape[1]
        extra += groups * O * Operations(multiplications=1, additions=1)
    if isinstance(part.neuron, Adaptive):
        extra += Operations(multiplications=O)
    if part.bias is not None:
        extra += Operations(additions=O)
    return {projection_kind(part): extra}


def projection_kind(part: Projection) -> str:
    """``head`` for the model's head, else ``projection``."""
    return "head" if part.path == "head" else "projection"


@operations.register
def _(part: ShortConvolution, activity: Activity) -> Kinds:
    """n multiply-accumulates per feature, a bias, SiLU."""
    features = part.weight.shape[0]
    each = macs(part.kernel, additions=0 if part.bias is None else 1, values=2)
    kinds = {"convolution": features * each}
    if part.activation == "silu":
        kinds["activation"] = features * SILU
    return kinds
