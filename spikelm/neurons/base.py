"""What every neuron shares: its interface, the firing-rate target, and building one from a configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from spikelm.errors import ConfigError, PlanError, nearest
from spikelm.recurrence import Context, Part, memory_dtype
from spikelm.registry import neurons
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register


@dataclass(frozen=True, kw_only=True)
class RateTarget:
    """Auxiliary loss ``weight * (rate - target)^2`` on a neuron's firing rate.

    Args:
        target: wanted share of (token, channel) pairs that fire, in [0, 1].
        weight: factor of the loss once the ramp is over.
        start: training step at which the loss begins.
        ramp: steps over which the weight rises linearly from 0.
    """

    target: float
    weight: float = 1.0
    start: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        """Refuse targets outside [0, 1] and negative weights or steps."""
        if not 0.0 <= self.target <= 1.0:
            raise ConfigError(f"rate_target.target is {self.target}; expected a share between 0 and 1")
        if self.weight < 0 or self.start < 0 or self.ramp < 0:
            raise ConfigError("rate_target weight, start and ramp must not be negative")

    def weight_at(self, step: int) -> float:
        """The factor of the loss at a training step."""
        if step < self.start:
            return 0.0
        if self.ramp == 0:
            return self.weight
        return self.weight * min(1.0, (step - self.start) / self.ramp)


@dataclass(frozen=True, kw_only=True)
class LoweredSpikes:
    """What a neuron hands to the product in a decode plan.

    Attributes:
        values: float32 spikes; None where counts are given.
        counts: int8 spikes, one byte each.
        scale: one float, what the product is multiplied with; None for 1.
        before: x of counts round(x / scale) that a cap may have made smaller; None without a cap.
    """

    values: Register | None = None
    counts: Register | None = None
    scale: Register | None = None
    before: Register | None = None


class Neuron(Part):
    """A part that keeps the feature dimension: x [.., D] -> spikes [.., D].

    Subclasses implement ``step`` (and ``init_state`` if they have a membrane), call ``super().__init__`` with
    their common options, and may override :meth:`encode` when their output is ``spikes * scale`` with integer
    spikes, and :meth:`fast` with a kernel over the sequence.

    Args:
        features: D.
        rate_target: mapping with the fields of :class:`RateTarget`, or None.
    """

    spiking: ClassVar[bool] = True
    """Whether the output consists of spikes (binary or integer); false only for ``none``."""
    binary: ClassVar[bool] = False
    """Whether every spike is 0 or 1."""

    def __init__(self, features: int, *, rate_target: Mapping[str, Any] | None = None) -> None:
        """Store the size and parse the rate target."""
        super().__init__()
        self.features = features
        self.rate_target = None if rate_target is None else _rate_target(rate_target)

    def fast(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """``sequence`` without the auxiliary loss; the default is the scan of ``step``."""
        return super().sequence(x, state, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """Spikes over T tokens; adds the firing-rate loss where one is asked for."""
        y, state = self.fast(x, state, ctx)
        self.add_rate_loss(x, y, ctx)
        return y, state

    def encode(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor | None, State]:
        """Spikes for a matrix product, and what the product is to be multiplied with.

        Returns:
            spikes [.., D], scale [.., 1] or None for 1, state. ``spikes * scale`` is what calling the
            neuron returns.
        """
        y, state = self(x, state, ctx)
        return y, None, state

    def encode_int8(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor | None, State]:
        """:meth:`encode` without gradients, for a product with int8 weights.

        The same spikes, in int8 where the neuron makes such at once; what is NaN there is 0 here, with a
        scale that is NaN or infinite.
        """
        return self.encode(x, state, ctx)

    def clipped(self, x: Tensor, spikes: Tensor, scale: Tensor | None) -> Tensor | None:
        """Where the cap made a count smaller, bool [.., D], or None without a cap.

        Args:
            x: input of :meth:`encode`, [.., D].
            spikes: what it returned.
            scale: what it returned.
        """
        return None

    def fired(self, x: Tensor, spikes: Tensor) -> Tensor:
        """1.0 where a channel fired, differentiable in x through a surrogate; [.., D]."""
        return spikes

    def lower_spikes(self, plan: Builder, x: Register, state: Fields, integer: bool = False) -> LoweredSpikes:
        """:meth:`encode` in a decode plan; the default is :meth:`lower` without a scale.

        Args:
            plan: the plan under construction.
            x: register of the input.
            state: the neuron's.
            integer: whether int8 counts are wanted in place of float32 spikes.

        Raises:
            PlanError: the neuron has no records, or no int8 counts.
        """
        if integer:
            raise PlanError(f"the neuron {type(self).__name__} has no int8 counts in decode plans")
        return LoweredSpikes(values=self.lower(plan, x, state))

    def add_rate_loss(self, x: Tensor, spikes: Tensor, ctx: Context) -> None:
        """Append the firing-rate loss of this call to ``ctx.losses`` (sequences only)."""
        if self.rate_target is None or ctx.losses is None:
            return
        weight = self.rate_target.weight_at(ctx.step)
        if weight == 0.0:
            return
        fired = self.fired(x, spikes).to(memory_dtype(x))
        if ctx.valid is None:
            rate = fired.mean()
        else:
            count = ctx.valid.sum().clamp(min=1) * fired.shape[-1]
            rate = (fired * ctx.valid[..., None]).sum() / count
        ctx.losses.append(weight * (rate - self.rate_target.target) ** 2)


def _rate_target(options: Mapping[str, Any]) -> RateTarget:
    fields = RateTarget.__dataclass_fields__
    for key in options:
        if key not in fields:
            raise ConfigError(nearest("rate_target option", key, fields))
    if "target" not in options:
        raise ConfigError("rate_target needs `target`, the wanted share of firing channels")
    for key, value in options.items():
        annotation = str(fields[key].type)
        if not _fits(value, annotation):
            raise ConfigError(f"rate_target.{key} is {value!r}; expected {_WORDS[annotation]}")
    return RateTarget(**options)


class Gain(nn.Module):
    """Learned gain per channel in front of a binary neuron, so that a fixed threshold fits every input."""

    def __init__(self, features: int, initial: float) -> None:
        """Start every channel at ``initial``."""
        super().__init__()
        if not initial > 0:
            raise ConfigError(f"neuron gain is {initial}; expected a positive number or null")
        self.log_gain = nn.Parameter(torch.full((features,), float(initial)).log())

    def forward(self, x: Tensor) -> Tensor:
        """X [.., D] times the gain, in x's memory dtype."""
        dtype = memory_dtype(x)
        return x.to(dtype) * self.factor(dtype)

    def factor(self, dtype: torch.dtype) -> Tensor:
        """The gain, [D]."""
        return self.log_gain.to(dtype).exp()


def build_part(kind: str, cls: type[Any], options: Mapping[str, Any], *args: Any) -> Any:
    """``cls(*args, **options)``, after every option's name and type were checked.

    Raises:
        ConfigError: for an option that does not exist or does not have the type of its annotation.
    """
    known: dict[str, str] = {}
    for base in cls.__mro__:
        if "__init__" not in base.__dict__:
            continue
        parameters = inspect.signature(base.__dict__["__init__"]).parameters.values()
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                known.setdefault(parameter.name, _annotation(parameter.annotation))
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break  # a constructor without **options hides those of its bases
    for key, value in options.items():
        if key not in known:
            raise ConfigError(nearest(f"option of {kind}", key, known))
        if not any(_fits(value, kind_of) for kind_of in known[key].split(" | ")):
            wanted = " or ".join(_WORDS.get(kind_of, "a mapping") for kind_of in known[key].split(" | "))
            raise ConfigError(f"{key} of {kind} is {value!r}; expected {wanted}")
    return cls(*args, **options)


_WORDS = {
    "float": "a finite number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "None": "null",
}


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value of a configuration has an annotated type; types not known here accept everything."""
    if annotation == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in ("bool", "str"):
        return type(value).__name__ == annotation
    if annotation == "None":
        return value is None
    return isinstance(value, Mapping) if annotation.startswith(("Mapping", "dict")) else True


def build_neuron(spec: Mapping[str, Any], features: int) -> Neuron:
    """The neuron of a specification such as ``{"name": "lif", "tau": 2.0}``.

    Raises:
        ConfigError: for an unknown name or option.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"a neuron needs a name, got {dict(spec)!r}; for example {{'name': 'lif'}}")
    neuron: Neuron = build_part(f"neuron {name!r}", neurons.get(name), options, features)
    return neuron
