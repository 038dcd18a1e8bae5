"""``heaviside``: a stateless binary neuron, s = [gain * x >= threshold].

The binary embedding of SpikeGPT (arXiv 2302.13939, section 3.2) is this neuron with threshold 0.
State: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from spikelm.neurons.base import Gain, Neuron
from spikelm.recurrence import Context, memory_dtype, zero_invalid
from spikelm.registry import neurons
from spikelm.state import State
from spikelm.surrogate import check_surrogate, spike


@neurons.register("heaviside")
class Heaviside(Neuron):
    """Fires where the input reaches the threshold.

    Args:
        features: D.
        threshold: in units of the (gained) input.
        gain: initial value of a learned gain per channel, or None for none.
        surrogate: derivative used backward.
        alpha: sharpness of the surrogate.
        rate_target: see :class:`spikelm.neurons.base.RateTarget`.
    """

    binary: ClassVar[bool] = True

    def __init__(
        self,
        features: int,
        *,
        threshold: float = 0.0,
        gain: float | None = None,
        surrogate: str = "atan",
        alpha: float = 2.0,
        rate_target: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the options."""
        super().__init__(features, rate_target=rate_target)
        check_surrogate(surrogate, alpha)
        self.threshold, self.surrogate, self.alpha = float(threshold), surrogate, float(alpha)
        self.gain = None if gain is None else Gain(features, gain)

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """S = [gain * x >= threshold], [B, D]."""
        h = x.to(memory_dtype(x)) if self.gain is None else self.gain(x)
        return spike(h - self.threshold, self.surrogate, self.alpha), state

    def fast(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """The step on all tokens at once: there is no state."""
        y, state = self.step(x, state, ctx)
        return zero_invalid(y, ctx), state
