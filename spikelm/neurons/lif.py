"""``lif``, ``plif`` and ``if``: leaky (parametric, or not leaky) integrate-and-fire over the token dimension.

Charge, fire, reset, one membrane v per channel (SpikeGPT, arXiv 2302.13939, equations 1 to 3; plif: Fang et
al. 2021, arXiv 2007.05785, equation 9)::

    h = v + (x - (v - v_reset)) / tau     decay_input
    h = v - (v - v_reset) / tau + x       otherwise;  ``if``: h = v + x
    s = [h >= threshold]
    v = v_reset where s, else h           hard reset
    v = h - threshold * s                 soft reset

State: {"membrane": [B, D]}. Deviations from SpikeGPT: none with the default options; the membrane is part of
the state, so decoding continues exactly where training's forward would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spikelm.errors import ConfigError
from spikelm.kernels.lif import lif
from spikelm.kernels.plan.builder import DECAY_INPUT, INT8_SPIKES, SOFT_RESET, a_field
from spikelm.neurons.base import Gain, LoweredSpikes, Neuron
from spikelm.recurrence import Context, memory_dtype
from spikelm.registry import neurons
from spikelm.state import State
from spikelm.surrogate import check_surrogate, spike

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register


class IntegrateAndFire(Neuron):
    """What the three neurons share; subclasses say how fast the membrane leaks.

    Args:
        features: D.
        threshold: membrane at which the neuron fires.
        reset: ``hard`` (to v_reset) or ``soft`` (by subtraction of the threshold).
        v_reset: membrane after a hard reset, at rest and at the start; 0 with a soft reset.
        decay_input: whether the input is divided by tau too.
        detach_reset: whether the reset is outside the gradient.
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
        threshold: float = 1.0,
        reset: str = "hard",
        v_reset: float = 0.0,
        decay_input: bool = True,
        detach_reset: bool = False,
        gain: float | None = None,
        surrogate: str = "atan",
        alpha: float = 2.0,
        rate_target: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the options."""
        super().__init__(features, rate_target=rate_target)
        check_surrogate(surrogate, alpha)
        if reset not in ("hard", "soft"):
            raise ConfigError(f"neuron reset is {reset!r}; expected 'hard' or 'soft'")
        if reset == "soft" and v_reset != 0.0:
            raise ConfigError(f"a soft reset subtracts the threshold; v_reset is {v_reset}, expected 0")
        if not threshold > v_reset:
            raise ConfigError(f"threshold {threshold} must be above v_reset {v_reset}")
        self.threshold, self.v_reset = float(threshold), float(v_reset)
        self.soft_reset = reset == "soft"
        self.decay_input, self.detach_reset = bool(decay_input), bool(detach_reset)
        self.surrogate, self.alpha = surrogate, float(alpha)
        self.gain = None if gain is None else Gain(features, gain)

    def leak(self, like: Tensor) -> Tensor:
        """1 / tau of every channel, [D], in the dtype of ``like``."""
        raise NotImplementedError

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """Membranes at rest, [batch, D]."""
        dtype = dtype or torch.float32
        return {"membrane": torch.full((batch, self.features), self.v_reset, device=device, dtype=dtype)}

    def _drive(self, x: Tensor) -> Tensor:
        return x.to(memory_dtype(x)) if self.gain is None else cast(Tensor, self.gain(x))

    def charge(self, x: Tensor, membrane: Tensor) -> Tensor:
        """The membrane after an input and before it fires, h of the equations; x [B, D], membrane [B, D]."""
        x = self._drive(x)
        v = membrane.to(x.dtype)
        leak = self.leak(x)
        rest = v - self.v_reset
        return v + (x - rest) * leak if self.decay_input else v - rest * leak + x

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """Charge, fire, reset."""
        h = self.charge(x, cast(Tensor, state["membrane"]))
        s = spike(h - self.threshold, self.surrogate, self.alpha)
        fired = s.detach() if self.detach_reset else s
        v = h - self.threshold * fired if self.soft_reset else h * (1 - fired) + self.v_reset * fired
        return s, {"membrane": v}

    def fast(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One kernel over the sequence."""
        x = self._drive(x)
        s, v = lif(
            x,
            cast(Tensor, state["membrane"]),
            self.leak(x),
            threshold=self.threshold,
            v_reset=self.v_reset,
            soft_reset=self.soft_reset,
            decay_input=self.decay_input,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate,
            alpha=self.alpha,
            reset=ctx.reset,
            valid=ctx.valid,
        )
        return s, {"membrane": v}

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token, spikes in float32."""
        return self._lower(plan, x, state, plan.register(self.features), 0)

    def lower_spikes(self, plan: Builder, x: Register, state: Fields, integer: bool = False) -> LoweredSpikes:
        """One token."""
        if not integer:
            return LoweredSpikes(values=self.lower(plan, x, state))
        return LoweredSpikes(
            counts=self._lower(plan, x, state, plan.bytes_register(self.features), INT8_SPIKES)
        )

    def _lower(self, plan: Builder, x: Register, state: Fields, spikes: Register, flags: int) -> Register:
        like = torch.zeros(())
        gain = None if self.gain is None else self.gain.factor(like.dtype)
        flags |= (SOFT_RESET if self.soft_reset else 0) | (DECAY_INPUT if self.decay_input else 0)
        plan.record(
            "lif",
            *(x, a_field(state["membrane"]), spikes, self.features),
            f=(self.threshold, self.v_reset),
            p=(self.leak(like), gain),
            flags=flags,
        )
        return spikes


def _check_tau(tau: float) -> float:
    if not tau >= 1.0:
        raise ConfigError(f"neuron tau is {tau}; expected at least 1 (1 forgets everything each token)")
    return float(tau)


@neurons.register("lif")
class LIF(IntegrateAndFire):
    """Leaky integrate-and-fire with a fixed time constant.

    Args:
        features: D.
        tau: membrane time constant in tokens, >= 1.
        options: see :class:`IntegrateAndFire`.
    """

    def __init__(self, features: int, *, tau: float = 2.0, **options: Any) -> None:
        """Check tau."""
        super().__init__(features, **options)
        self.tau = _check_tau(tau)

    def leak(self, like: Tensor) -> Tensor:
        """1 / tau, the same for every channel."""
        return torch.full((self.features,), 1.0 / self.tau, device=like.device, dtype=like.dtype)


@neurons.register("plif")
class PLIF(IntegrateAndFire):
    """Leaky integrate-and-fire with a learned time constant per channel, 1/tau = sigmoid(w).

    Args:
        features: D.
        tau: initial time constant in tokens, > 1.
        options: see :class:`IntegrateAndFire`.
    """

    full_precision = ("leak_logit",)

    def __init__(self, features: int, *, tau: float = 2.0, **options: Any) -> None:
        """Start every channel at ``tau``."""
        super().__init__(features, **options)
        if not tau > 1.0:
            raise ConfigError(f"initial tau of plif is {tau}; expected more than 1")
        self.leak_logit = nn.Parameter(torch.full((features,), -math.log(tau - 1.0)))

    def leak(self, like: Tensor) -> Tensor:
        """sigmoid(w) per channel."""
        return torch.sigmoid(self.leak_logit.to(like.dtype))


@neurons.register("if")
class IF(IntegrateAndFire):
    """Integrate-and-fire without leak; ``decay_input`` does not apply.

    Args:
        features: D.
        options: see :class:`IntegrateAndFire`.
    """

    def __init__(self, features: int, **options: Any) -> None:
        """Refuse decay_input, which would need a time constant."""
        if options.setdefault("decay_input", False):
            raise ConfigError("the neuron 'if' has no time constant; decay_input must stay false")
        super().__init__(features, **options)

    def leak(self, like: Tensor) -> Tensor:
        """Zeros: nothing leaks."""
        return like.new_zeros(self.features)
