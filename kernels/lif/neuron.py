"""Constants of a leaky integrate-and-fire neuron, handed from the public op to its forms."""

from __future__ import annotations

from dataclasses import dataclass

from spikelm.kernels.lif.surrogates import Derivative


@dataclass(frozen=True, kw_only=True)
class Neuron:
    """What does not vary over tokens or channels.

    Attributes:
        threshold: membrane at which the neuron fires.
        v_reset: resting membrane, to which it leaks and (hard reset) returns after a spike.
        soft_reset: subtract the threshold after a spike instead of returning to ``v_reset``.
        decay_input: the input is scaled by the leak rate too.
        detach_reset: no gradient flows through the spike inside the reset.
        surrogate: name of a surrogate gradient, or a function (u, alpha) -> derivative.
        alpha: sharpness of the surrogate.
    """

    threshold: float = 1.0
    v_reset: float = 0.0
    soft_reset: bool = False
    decay_input: bool = True
    detach_reset: bool = False
    surrogate: str | Derivative = "atan"
    alpha: float = 2.0

    @property
    def rest(self) -> float:
        """Membrane before the first token and after a document boundary."""
        return 0.0 if self.soft_reset else self.v_reset
