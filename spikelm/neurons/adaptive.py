"""``adaptive``: integer spike counts in units of a threshold that follows the token's own magnitude.

SpikingBrain (arXiv 2509.05276, section 3.3): V = mean|x| / k over the features of a token, count
n = round(x / V). Two additions: a dead zone, counts are zero where |x| < dead_zone * mean|x| (most
channels stay silent, those that fire keep a fine magnitude), and a cap, |n| <= cap (127: counts fit
int8; null: no cap, as in the report, except before int8 weights, where it is 127).
Output n * V. Gradient: straight-through, d(n V)/dx = 1, zero where the cap bites.
State: none. Deviation from the report: V has a tiny floor (1e-8) instead of the release's clamp to
[1e-5, 1e4], so that small activations are not silenced by an absolute constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikelm.errors import ConfigError, PlanError
from spikelm.kernels.encode import adaptive_encode, adaptive_encode_int8
from spikelm.kernels.plan.builder import INT8_SPIKES
from spikelm.neurons.base import LoweredSpikes, Neuron
from spikelm.recurrence import Context, memory_dtype, zero_invalid
from spikelm.registry import neurons
from spikelm.state import State
from spikelm.surrogate import spike

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

UNLIMITED = 2**24
"""Cap that stands for none: beyond it float32 counts would not be whole numbers in steps of one."""


@neurons.register("adaptive")
class Adaptive(Neuron):
    """Adaptive threshold to integer counts.

    Args:
        features: D.
        k: counts that a channel of mean magnitude emits; V = mean|x| / k.
        dead_zone: channels below this many mean magnitudes stay silent.
        cap: largest |count|, at most 127, so that counts fit int8; None for no limit.
        rate_target: see :class:`spikelm.neurons.base.RateTarget`.

    Attributes:
        whole_mean: x [.., D'] -> mean|x| [.., 1] over the whole rows, where x holds a part of their features
            (set by :mod:`spikelm.tensor_parallel`); None where x is whole.
    """

    whole_mean: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        features: int,
        *,
        k: float = 3.0,
        dead_zone: float = 0.0,
        cap: int | None = 127,
        rate_target: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the options."""
        super().__init__(features, rate_target=rate_target)
        if not k > 0:
            raise ConfigError(f"adaptive k is {k}; expected a positive number")
        if not dead_zone >= 0:
            raise ConfigError(f"adaptive dead_zone is {dead_zone}; expected zero or more")
        if cap is not None and not (isinstance(cap, int) and 1 <= cap <= 127):
            raise ConfigError(
                f"adaptive cap is {cap!r}; expected a whole number from 1 to 127 (counts are int8), "
                "or null for no limit"
            )
        self.k, self.dead_zone, self.cap = float(k), float(dead_zone), cap

    def encode(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor | None, State]:
        """Integer counts [.., D] and the threshold [.., 1] that the product is to be scaled with."""
        return self._counts(x, state, ctx)

    def encode_int8(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor | None, State]:
        """The same in int8; a subclass with an :meth:`encode` of its own is asked for that."""
        if type(self).encode is not Adaptive.encode:
            return self.encode(x, state, ctx)
        return self._counts(x, state, ctx, integer=self.cap is not None)

    def _counts(
        self, x: Tensor, state: State, ctx: Context, integer: bool = False
    ) -> tuple[Tensor, Tensor, State]:
        x = zero_invalid(x, ctx) if x.dim() == 3 else x
        cap = UNLIMITED if self.cap is None else self.cap
        mean = None if self.whole_mean is None else self.whole_mean(x.detach())
        options: dict[str, Any] = {"k": self.k, "dead_zone": self.dead_zone, "cap": cap, "mean": mean}
        if integer:
            counts, threshold, _ = adaptive_encode_int8(x, **options)
        else:
            counts, threshold = adaptive_encode(x, **options)
        if x.dim() == 3:
            self.add_rate_loss(x, counts, ctx)
        return counts, threshold, state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """N V with V = mean|x| / k, n = round(x / V) outside the dead zone, 0 inside."""
        counts, threshold, state = self._counts(x, state, ctx)
        return counts * threshold, state

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """The step on all tokens at once: there is no state."""
        return self.step(x, state, ctx)

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token: n V."""
        spikes = self.lower_spikes(plan, x, state)
        assert spikes.values is not None and spikes.scale is not None
        y = plan.register(self.features)
        plan.record("scale_row", spikes.values, spikes.scale, y, self.features)
        return y

    def lower_spikes(self, plan: Builder, x: Register, state: Fields, integer: bool = False) -> LoweredSpikes:
        """One token: counts and their threshold."""
        if self.whole_mean is not None:
            raise PlanError(f"{self.path} belongs to a tensor-parallel shard; decode plans run whole models")
        if integer and self.cap is None:
            raise PlanError(f"{self.path} has no cap, so its counts need not fit int8; give it a cap of 127")
        # Query, key and value see the same counts, and so do other neurons of the same options on one input.
        key = ("encode", x, self.k, self.dead_zone, self.cap, integer)
        return plan.once(key, lambda: self._records(plan, x, integer))

    def _records(self, plan: Builder, x: Register, integer: bool) -> LoweredSpikes:
        counts = plan.bytes_register(self.features) if integer else plan.register(self.features)
        threshold = plan.register(1)
        plan.record(
            "encode",
            *(x, counts, threshold, self.features),
            f=(self.k, self.dead_zone, UNLIMITED if self.cap is None else self.cap),
            flags=INT8_SPIKES if integer else 0,
        )
        before = None if self.cap is None else x
        if integer:
            return LoweredSpikes(counts=counts, scale=threshold, before=before)
        return LoweredSpikes(values=counts, scale=threshold, before=before)

    def clipped(self, x: Tensor, spikes: Tensor, scale: Tensor | None) -> Tensor | None:
        """Where |round(x / V)| exceeds the cap; a count that just reaches it is not cut off."""
        if self.cap is None or scale is None:
            return None
        return (torch.round(x.detach().to(scale.dtype) / scale).abs() > self.cap) & (spikes != 0)

    def fired(self, x: Tensor, spikes: Tensor) -> Tensor:
        """1.0 where a channel fired; the surrogate derivative is a triangle of width one mean magnitude."""
        x = x.to(memory_dtype(x))
        magnitude = x.abs()
        mean = magnitude.mean(-1, keepdim=True).clamp(min=1e-8).detach()
        quiet = max(self.dead_zone, 0.5 / self.k)
        soft = spike(magnitude / mean - quiet, "triangle", 1.0)
        return soft + ((spikes != 0).to(soft.dtype) - soft).detach()
