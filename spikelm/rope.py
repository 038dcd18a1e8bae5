"""Rotary positions (RoPE, arXiv 2104.09864, equation 34) with float64 angles.

Features i and i + d/2 of a head are a pair that turns by position * frequency_i (the layout of Llama and
Qwen). Angles, sines and cosines are float64, whatever the dtype of the features: a float32 angle at position
1,000,000 is off by up to 0.03 radians, a float64 one by 1e-10.

Scaling dictionaries are those of Hugging Face configurations: ``linear``, ``llama3`` and ``yarn``
(arXiv 2309.00071). Their frequencies are constants of the model, so keys may be stored rotated; ``dynamic``
and ``longrope``, whose frequencies change with the length of the text, are refused for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikelm.errors import ConfigError, ShapeError, nearest
from spikelm.kernels.plan.builder import a_field

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Field, Fields, Register

TABLE_HEAD = 2
"""Floats in front of a table of sines in a decode plan, which hold the position it was made for."""

# Frequencies and the factor on the features. Plain numbers: models are also built on the meta device.
_Scaled = tuple[list[float], float]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation of one kind of heads.

    Attributes:
        frequencies: radians per position of every pair; their number is half that of the rotated features.
        magnitude: factor of the rotated features (YaRN's attention factor, 1 elsewhere).
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    @property
    def features(self) -> int:
        """Features of a head that are rotated: the first ones."""
        return 2 * len(self.frequencies)

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Turn the features of every head.

        Args:
            x: [B, T, H, d], or [B, H, d] for a single step.
            position: int64 [B, T], or [B].

        Returns:
            The same shape and dtype; computed in float64 for float64, else in float32.

        Raises:
            ShapeError: position does not fit x, or d is less than the rotated features.
        """
        if position.shape != x.shape[:-2] or x.shape[-1] < self.features:
            raise ShapeError(
                f"rotary positions {tuple(position.shape)} for features {tuple(x.shape)}; expected the shape "
                f"of x without its last two dimensions, and at least {self.features} features"
            )
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        frequency = torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        angle = position[..., None, None].to(torch.float64) * frequency
        cos = (angle.cos() * self.magnitude).to(compute)
        sin = (angle.sin() * self.magnitude).to(compute)
        turned, kept = x[..., : self.features], x[..., self.features :]
        a, b = turned.to(compute).chunk(2, -1)
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
        return torch.cat([y, kept], -1) if kept.shape[-1] else y

    def lower(
        self,
        plan: Builder,
        q: Register,
        k: Register,
        features: int,
        position: Field | Fields,
        first: int = 0,
        advance: bool = False,
    ) -> None:
        """Records that turn one token's query and key heads where they stand.

        Args:
            plan: what they are added to.
            q: query heads.
            k: key heads.
            features: of a head, d.
            position: int64 field of the state.
            first: rotary position of the token at position 0.
            advance: whether the position then counts this token.
        """
        pairs = len(self.frequencies)
        frequency = torch.tensor(self.frequencies, dtype=torch.float64)
        plan.record(
            "rope",
            q,
            q.width // features,
            k,
            k.width // features,
            features,
            pairs,
            plan.shared(("rope", self, first), TABLE_HEAD + 2 * pairs),
            a_field(position),
            first,
            f=(self.magnitude,),
            p=(plan.keep(frequency).data_ptr(),),
            flags=int(advance),
        )


def resolve_rope(
    head_dim: int,
    *,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    partial_rotary_factor: float = 1.0,
) -> Rope:
    """The rotation that a configuration asks for.

    Args:
        head_dim: d, features of a head.
        theta: base; pair i of r rotated features turns theta^(-2i/r) radians per position, before scaling.
        scaling: {"rope_type": "linear" | "llama3" | "yarn", ...} with the keys of Hugging Face (``type`` is
            an old name of ``rope_type``); None or ``default`` for none.
        partial_rotary_factor: share of the features that are rotated.

    Raises:
        ConfigError: an unknown kind or key, a missing key, or a value that makes no rotation.
    """
    if not _number(theta) or theta <= 1:
        raise ConfigError(f"rope_theta is {theta!r}; expected a number above 1")
    if not _number(partial_rotary_factor) or not 0 < partial_rotary_factor <= 1:
        raise ConfigError(f"partial_rotary_factor is {partial_rotary_factor!r}; expected 0 < factor <= 1")
    features = int(head_dim * partial_rotary_factor)
    if features < 2 or features % 2:
        raise ConfigError(
            f"{features} of {head_dim} features of a head would be rotated; expected an even number of at "
            "least 2: change head_dim or partial_rotary_factor, or set rope: false"
        )
    frequencies, magnitude = [float(theta) ** (-i / features) for i in range(0, features, 2)], 1.0
    if scaling is not None:
        kind, options = _checked(scaling)
        frequencies, magnitude = _KINDS[kind].apply(frequencies, float(theta), options)
    return Rope(frequencies=tuple(frequencies), magnitude=magnitude)


def rotate(
    x: Tensor,
    position: Tensor,
    *,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    partial_rotary_factor: float = 1.0,
) -> Tensor:
    """Rotate x [B, T, H, d] by position [B, T], or x [B, H, d] by position [B]; see :class:`Rope`."""
    rope = resolve_rope(
        x.shape[-1], theta=theta, scaling=scaling, partial_rotary_factor=partial_rotary_factor
    )
    return rope.rotate(x, position)


def _default(frequencies: list[float], theta: float, options: Mapping[str, Any]) -> _Scaled:
    return frequencies, 1.0


def _linear(frequencies: list[float], theta: float, options: Mapping[str, Any]) -> _Scaled:
    """Positions divided by the factor."""
    return [frequency / options["factor"] for frequency in frequencies], 1.0


def _llama3(frequencies: list[float], theta: float, options: Mapping[str, Any]) -> _Scaled:
    """Slow pairs are slowed by the factor, fast ones not at all, those between them in part."""
    low, high = float(options["low_freq_factor"]), float(options["high_freq_factor"])
    length, factor = float(options["original_max_position_embeddings"]), float(options["factor"])
    if high <= low:
        raise ConfigError(
            f"rope_scaling has high_freq_factor {high} and low_freq_factor {low}; expected high > low"
        )

    def slowed(frequency: float) -> float:
        kept = _unit((length * frequency / (2 * math.pi) - low) / (high - low))
        return frequency * (kept + (1 - kept) / factor)

    return [slowed(frequency) for frequency in frequencies], 1.0


def _yarn(frequencies: list[float], theta: float, options: Mapping[str, Any]) -> _Scaled:
    """YaRN: as llama3 with a ramp over the pairs' indices, and a factor on the features."""
    features, factor = 2 * len(frequencies), options["factor"]
    length = options["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """Index of the pair that turns that often in the original length."""
        return features * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(options.get("beta_fast") or 32), pair(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, features - 1)
    width = high - low or 0.001
    slowed = [_unit((index - low) / width) for index in range(len(frequencies))]
    magnitude = options.get("attention_factor")
    if magnitude is None:
        scale, whole = options.get("mscale"), options.get("mscale_all_dim")
        if scale and whole:
            magnitude = _temperature(factor, scale) / _temperature(factor, whole)
        else:
            magnitude = _temperature(factor, 1.0)
    return [f * (s / factor + 1 - s) for f, s in zip(frequencies, slowed, strict=True)], float(magnitude)


def _unit(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _temperature(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A way to scale, with the keys it must have and those it may have."""

    apply: Callable[[list[float], float, Mapping[str, Any]], _Scaled]
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "default": _Kind(apply=_default),
        "linear": _Kind(apply=_linear, needed=("factor",)),
        "llama3": _Kind(
            apply=_llama3,
            needed=("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        ),
        "yarn": _Kind(
            apply=_yarn,
            needed=("factor", "original_max_position_embeddings"),
            optional=("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
        ),
    }
)


def _checked(scaling: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and options of a scaling dictionary."""
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling is {scaling!r}; expected a mapping with rope_type, or null")
    options = dict(scaling)
    old = options.pop("type", None)
    kind = options.pop("rope_type", old)
    if kind not in _KINDS:
        raise ConfigError(nearest("rope_type in rope_scaling", str(kind), _KINDS))
    entry = _KINDS[kind]
    for key in options:
        if key not in (*entry.needed, *entry.optional):
            raise ConfigError(
                nearest(f"key in rope_scaling of kind {kind!r}", key, (*entry.needed, *entry.optional))
            )
    for key in entry.needed:
        if key not in options:
            raise ConfigError(
                f"rope_scaling of kind {kind!r} lacks {key!r}; it needs {', '.join(entry.needed)}"
            )
    for key, value in options.items():
        if key == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(f"truncate in rope_scaling is {value!r}; expected true or false")
        elif value is None and key in entry.optional:
            continue
        elif not _number(value) or value <= 0:
            raise ConfigError(f"{key} in rope_scaling is {value!r}; expected a positive number")
    return kind, options


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
