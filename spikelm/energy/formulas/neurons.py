"""Neurons: what firing itself costs, for D channels."""

from __future__ import annotations

from spikelm.energy.activity import Activity
from spikelm.energy.counts import Kinds, Operations, macs
from spikelm.energy.operations import operations
from spikelm.neurons.adaptive import Adaptive
from spikelm.neurons.heaviside import Heaviside
from spikelm.neurons.lif import IF, IntegrateAndFire
from spikelm.neurons.none import Identity


@operations.register
def _(part: Identity, activity: Activity) -> Kinds:
    """No neuron: nothing."""
    return {}


@operations.register
def _(part: Adaptive, activity: Activity) -> Kinds:
    """Adaptive counts, per token; SpikingBrain (arXiv 2509.05276, section 3.3).

    Mean magnitude: D additions, one multiplication with 1/D; V: one with 1/k, one comparison with its floor.
    Counts: D divisions x / V and D roundings, as the kernels do them. Dead zone: one multiplication, D
    comparisons. Cap: 2 D comparisons.
    """
    D = part.features
    zone = part.dead_zone > 0
    comparisons = 1 + D * (zone + (0 if part.cap is None else 2))
    return {
        "neuron": Operations(
            additions=D,
            multiplications=2 + zone,
            divisions=D,
            roundings=D,
            comparisons=comparisons,
            values=2 * D,
        )
    }


@operations.register
def _(part: IntegrateAndFire, activity: Activity) -> Kinds:
    """LIF and its kin, per channel; SpikeGPT (arXiv 2302.13939, equations 1 to 3).

    Charge with decay_input: v - v_reset (free at 0), x minus that, one multiply-accumulate with 1/tau.
    Without it: one multiply-accumulate and the addition of x; ``if`` leaks nothing: the addition alone. One
    comparison with the threshold. A soft reset is one subtraction, a hard one a choice. A gain is one
    multiplication.
    """
    D = part.features
    rest = 0 if part.v_reset == 0.0 else 1
    charge = Operations(additions=1) if isinstance(part, IF) else macs(1, additions=1 + rest)
    reset = Operations(additions=1 if part.soft_reset else 0)
    gain = Operations(multiplications=0 if part.gain is None else 1)
    return {"neuron": D * (charge + reset + gain + Operations(comparisons=1, values=2))}


@operations.register
def _(part: Heaviside, activity: Activity) -> Kinds:
    """A comparison per channel, and a multiplication with the gain where there is one."""
    gain = 0 if part.gain is None else 1
    return {"neuron": part.features * Operations(comparisons=1, multiplications=gain, values=2)}
