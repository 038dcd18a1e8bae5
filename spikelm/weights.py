"""How a projection holds its weights.

``{"name": "float"}``: an ``nn.Linear`` without bias. ``{"name": "int8", "group_size": 128}``: an
:class:`Int8Linear`, symmetric int8 with one float32 scale per output and group of inputs (``group_size:
null``: one scale per output), for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from spikelm.errors import ConfigError, ShapeError, nearest
from spikelm.kernels.int8_linear import LONGEST, dequantised, int8_linear
from spikelm.kernels.int8_linear.eager import LARGEST

__all__ = [
    "CLIP_RATIOS",
    "FLOAT",
    "GROUP_SIZE",
    "LARGEST",
    "Int8Linear",
    "build_weights",
    "dequantise",
    "quantise",
]

FLOAT: Mapping[str, Any] = MappingProxyType({"name": "float"})
GROUP_SIZE = 128
"""Inputs that share a scale where a configuration does not say."""
CLIP_RATIOS = tuple(round(1.0 - 0.02 * step, 2) for step in range(26))
"""Clipping ratios that the search tries, 1 down to 0.5."""


class Int8Linear(nn.Module):
    """Weights in int8; the product with integer counts is exact.

    Args:
        in_features: D.
        out_features: O.
        group_size: inputs that share a scale, the last group may be shorter; None for one scale per output.

    Attributes:
        weight: int8 [O, D], from -127 to 127; buffer.
        scales: float32 [O, ceil(D / group_size)]; buffer, which stays float32 in lower precisions.
    """

    full_precision = ("scales",)
    weight: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, group_size: int | None = GROUP_SIZE) -> None:
        """Zeros; the model's initialisation or a checkpoint fills them."""
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = 1 if group_size is None else -(-in_features // group_size)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(out_features, groups, dtype=torch.float32))

    @classmethod
    def from_float(cls, weight: Tensor, group_size: int | None = GROUP_SIZE, **options: Any) -> Self:
        """The int8 form of a float matrix [O, D]; options as :func:`quantise` has them."""
        linear = cls(weight.shape[1], weight.shape[0], group_size).to(weight.device)
        linear.load_float(weight, **options)
        return linear

    @torch.no_grad()
    def load_float(self, weight: Tensor, **options: Any) -> None:
        """Take over a float matrix [O, D]; options as :func:`quantise` has them."""
        values, scales = quantise(weight, self.group_size, **options)
        self.weight.copy_(values)
        self.scales.copy_(scales)

    def forward(self, counts: Tensor) -> Tensor:
        """Exact product with whole numbers: counts [.., D], at most 127 -> float32 [.., O]."""
        return int8_linear(counts, self.weight, self.scales, self.group_size)

    def weight_only(self, x: Tensor) -> Tensor:
        """Product of floating x [.., D] with the dequantised weights, in x's dtype; nothing is exact here."""
        return nn.functional.linear(x, self.dequantised().to(x.dtype))

    def dequantised(self) -> Tensor:
        """The float32 matrix [O, D] that the weights stand for."""
        return dequantised(self.weight, self.scales, self.group_size)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Moves and conversions; a lower precision leaves the scales in float32, as they are."""
        exact = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype not in (torch.float32, torch.float64):
            self.scales = exact.to(self.scales.device)
        return self


def build_weights(spec: Mapping[str, Any], in_features: int, out_features: int) -> nn.Module:
    """The matrix of a projection.

    Args:
        spec: {"name": "float"}: an ``nn.Linear`` without bias; {"name": "int8", "group_size": 128 or None}:
            an :class:`Int8Linear`.
        in_features: D.
        out_features: O.

    Raises:
        ConfigError: an unknown name or option, or a group size that cannot be.
    """
    options = {key: value for key, value in spec.items() if key != "name"}
    if spec["name"] not in ("float", "int8"):
        raise ConfigError(nearest("kind of weights", spec["name"], ["float", "int8"]))
    known = ["group_size"] if spec["name"] == "int8" else []
    for option in options:
        if option not in known:
            raise ConfigError(nearest(f"option of {spec['name']} weights", option, known))
    if spec["name"] == "float":
        return nn.Linear(in_features, out_features, bias=False)
    size = options.get("group_size", GROUP_SIZE)
    whole = isinstance(size, int) and not isinstance(size, bool)
    if size is not None and not (whole and 1 <= size <= LONGEST):
        raise ConfigError(
            f"group_size of int8 weights is {size!r}; expected a whole number from 1 to {LONGEST} "
            "(128 is usual), or null for one scale per output"
        )
    if size is None and in_features > LONGEST:
        raise ConfigError(f"one int8 scale per output sums {in_features} inputs; int32 holds {LONGEST}")
    return Int8Linear(in_features, out_features, size)


@torch.no_grad()
def quantise(
    weight: Tensor,
    group_size: int | None = GROUP_SIZE,
    clip: float | str = 1.0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Symmetric int8: w ~ scale * round(w / scale), half to even, scale = clip * max|w| / 127 per group.

    Args:
        weight: floating [O, D].
        group_size: inputs that share a scale, the last group may be shorter; None for one scale per output.
        clip: share of a group's largest magnitude that becomes 127, in (0, 1], what is larger is cut off;
            ``"mse"``: for every group the ratio of CLIP_RATIOS with the smallest squared error.
        importance: [D], factor of the squared errors of each input in the search, for example the input's
            mean square; None for 1.

    Returns:
        int8 [O, D] and float32 scales [O, ceil(D / group_size)]; a group of zeros has scale 1.

    Raises:
        ConfigError: another ``clip``.
        ShapeError: a weight that is no floating matrix, or one with NaN or infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ShapeError(f"quantise needs a floating matrix [O, D], got {weight.dtype} {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ShapeError("quantise got weights with NaN or infinity; int8 cannot hold them")
    if clip != "mse" and not (isinstance(clip, (int, float)) and 0 < clip <= 1):
        raise ConfigError(f"clip is {clip!r}; expected a number above 0 and up to 1, or 'mse'")
    outputs, width = weight.shape
    size = max(width, 1) if group_size is None else group_size
    grouped = _grouped(weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32), size)
    largest = grouped.abs().amax(-1, keepdim=True)
    if clip != "mse":
        values, scales = _rounded(grouped, largest, float(clip))
        return values.reshape(outputs, -1)[:, :width].contiguous(), scales[..., 0]
    factor = torch.ones(1, width, device=weight.device) if importance is None else importance[None]
    factor = _grouped(factor.to(grouped.dtype), size)
    best: tuple[Tensor, Tensor] | None = None
    lowest = torch.full_like(largest, torch.inf)
    for ratio in CLIP_RATIOS:
        values, scales = _rounded(grouped, largest, ratio)
        error = ((values * scales - grouped) ** 2 * factor).sum(-1, keepdim=True)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        if best is None:
            best = values, scales
        else:
            best = torch.where(better, values, best[0]), torch.where(better, scales, best[1])
    values, scales = cast(tuple[Tensor, Tensor], best)
    return values.reshape(outputs, -1)[:, :width].contiguous(), scales[..., 0]


def dequantise(values: Tensor, scales: Tensor, group_size: int | None = GROUP_SIZE) -> Tensor:
    """The matrix [O, D] that int8 values and their scales stand for, float32."""
    return dequantised(values, scales, group_size)


def _grouped(weight: Tensor, size: int) -> Tensor:
    """[O, D] as [O, groups, size], the last group filled up with zeros."""
    missing = -weight.shape[1] % size
    return cast(Tensor, nn.functional.pad(weight, (0, missing)).unflatten(1, (-1, size)))


def _rounded(grouped: Tensor, largest: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Int8 values [O, groups, size] and float32 scales [O, groups, 1]."""
    scales = (ratio * largest / 127.0).to(torch.float32)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = torch.round(grouped / scales).clamp(-127, 127)
    return values.to(torch.int8), scales
