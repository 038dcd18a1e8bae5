"""``heaviside``: a stateless binary neuron, s = [gain * x >= threshold].

The binary embedding of SpikeGPT (arXiv 2302.13939, section 3.2) is this neuron with threshold 0.
State: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from spikelm.kernels.plan.builder import INT8_SPIKES
from spikelm.neurons.base import Gain, LoweredSpikes, Neuron
from spikelm.recurrence import Context, memory_dtype, zero_invalid
from spikelm.registry import neurons
from spikelm.state import State
from spikelm.surrogate import check_surrogate, spike

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register


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

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token, spikes in float32."""
        return self._lower(plan, x, plan.register(self.features), 0)

    def lower_spikes(self, plan: Builder, x: Register, state: Fields, integer: bool = False) -> LoweredSpikes:
        """One token."""
        if not integer:
            return LoweredSpikes(values=self.lower(plan, x, state))
        return LoweredSpikes(counts=self._lower(plan, x, plan.bytes_register(self.features), INT8_SPIKES))

    def _lower(self, plan: Builder, x: Register, spikes: Register, flags: int) -> Register:
        gain = None if self.gain is None else self.gain.factor(torch.float32)
        plan.record("heaviside", x, spikes, self.features, f=(self.threshold,), p=(gain,), flags=flags)
        return spikes
