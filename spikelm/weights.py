"""How a projection holds its weights.

``{"name": "float"}``: an ``nn.Linear`` without bias. ``{"name": "int8", "group_size": 128}``: an
:class:`Int8Linear`, symmetric int8 with one float32 scale per output and group of inputs (``group_size:
null``: one scale per output), for inference.

On CPUs :func:`pack_model` lays int8 weights out for the C kernels, once, after a model is loaded:
``out_in`` for dense reading, or ``in_out``, of which a token reads only the inputs that fired; the choice
follows the share of counts that were silent when that was measured. Only the packed copy stays; ``weight``,
``scales`` and ``state_dict`` make the original tensors from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from spikelm.errors import ConfigError, KernelError, ShapeError, nearest
from spikelm.kernels.dispatch import choose
from spikelm.kernels.int8_linear import LONGEST, dequantised, int8_linear, integer_sums
from spikelm.kernels.int8_linear.eager import LARGEST
from spikelm.kernels.int8_linear.packing import PackedInt8, int8_linear_packed, packed_bytes
from spikelm.kernels.memory import Arena, aligned

__all__ = [
    "CLIP_RATIOS",
    "EVENT_DRIVEN_FROM",
    "FLOAT",
    "GROUP_SIZE",
    "LARGEST",
    "Int8Linear",
    "build_weights",
    "choose_layout",
    "dequantise",
    "pack_model",
    "quantise",
]

FLOAT: Mapping[str, Any] = MappingProxyType({"name": "float"})
GROUP_SIZE = 128
"""Inputs that share a scale where a configuration does not say."""
CLIP_RATIOS = tuple(round(1.0 - 0.02 * step, 2) for step in range(26))
"""Clipping ratios that the search tries, 1 down to 0.5."""
EVENT_DRIVEN_FROM = 0.7
"""Silent share of the counts from which reading only what fired is faster (benchmarks/int8_gemv.py)."""


class Int8Linear(nn.Module):
    """Weights in int8; the product with integer counts is exact.

    Args:
        in_features: D.
        out_features: O.
        group_size: inputs that share a scale, the last group may be shorter; None for one scale per output.

    Attributes:
        weight: int8 [O, D], from -127 to 127; buffer. Made anew at every look once the weights are packed.
        scales: float32 [O, ceil(D / group_size)]; buffer, which stays float32 in lower precisions; likewise.
        packed: the packed weights, None where they are not.
    """

    full_precision = ("scales",)
    weight: Tensor
    scales: Tensor
    packed: PackedInt8 | None

    def __init__(self, in_features: int, out_features: int, group_size: int | None = GROUP_SIZE) -> None:
        """Zeros; the model's initialisation or a checkpoint fills them."""
        super().__init__()
        self.packed = None
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
        self.unpack_()
        self.weight.copy_(values)
        self.scales.copy_(scales)

    @property
    def layout(self) -> str | None:
        """``out_in`` or ``in_out`` where the weights are packed, else None."""
        return None if self.packed is None else self.packed.layout

    @torch.no_grad()
    def pack_(self, layout: str = "out_in", arena: Arena | None = None) -> Self:
        """Lay the weights out for the C kernels, in place of the tensors that hold them now.

        Results keep their bits. Conversions, moves and loading act on the original tensors and pack again;
        assigning ``weight`` or ``scales`` ends the packing.

        Args:
            layout: ``out_in`` (dense), or ``in_out`` (a row of counts reads only the inputs that fired).
            arena: where the memory comes from; None for an allocation of its own.

        Raises:
            KernelError: an unknown layout, weights that are not on the CPU, or no C compiler.
            ShapeError: scales that are not float32.
        """
        self.packed = PackedInt8(self.weight, self.scales, self.group_size, layout, arena)
        self._buffers.clear()
        return self

    @torch.no_grad()
    def unpack_(self) -> Self:
        """Hold the weights as plain tensors again."""
        if self.packed is not None:
            weight, scales = self.packed.weight(), self.packed.scales()
            self.packed = None
            self.register_buffer("weight", weight)
            self.register_buffer("scales", scales)
        return self

    def forward(self, counts: Tensor, threshold: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Exact product with whole numbers, times what a count stands for, plus a bias.

        Args:
            counts: [.., D], at most 127.
            threshold: [.., 1]; None for 1. With it there is no gradient.
            bias: [O]; None for 0.

        Returns:
            float32 [.., O] (the scales' dtype): ``(product * threshold).to(float32) + bias``, with these bits
            also where it is done in one pass.
        """
        if self._uses_packed(counts) and not (torch.is_grad_enabled() and counts.requires_grad):
            packed = cast(PackedInt8, self.packed)
            if threshold is None or threshold.dtype == torch.float32:
                bias = None if bias is None else bias.float()
                return int8_linear_packed(counts, packed, threshold=threshold, bias=bias)
            y = int8_linear_packed(counts, packed)
            y = (y * threshold).to(y.dtype)
            return y if bias is None else y + bias.to(y.dtype)
        return int8_linear(counts, self.weight, self.scales, self.group_size, threshold=threshold, bias=bias)

    def integer_sums(self, counts: Tensor) -> Tensor:
        """Exact inner sums before any scale: counts [.., D] -> int32 [groups, .., O]."""
        if self._uses_packed(counts):
            return cast(PackedInt8, self.packed).integer_sums(counts)
        return integer_sums(counts, self.weight, self.group_size)

    def _uses_packed(self, counts: Tensor) -> bool:
        return self.packed is not None and choose("int8_linear", counts.device) == "c"

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
        layout = self.layout
        self.unpack_()
        exact = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype not in (torch.float32, torch.float64):
            self.scales = exact.to(self.scales.device)
        return self._packed_again(layout)

    def _packed_again(self, layout: str | None) -> Self:
        """Pack as before, where C can use what the weights have become."""
        usable = self.weight.device.type == "cpu" and self.scales.dtype == torch.float32
        return self if layout is None or not usable else self.pack_(layout)

    def __getattr__(self, name: str) -> Any:
        """The original tensors of packed weights."""
        packed = self.__dict__.get("packed")
        if packed is not None and name == "weight":
            return packed.weight()
        if packed is not None and name == "scales":
            return packed.scales()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A new weight is one of plain tensors."""
        if name in ("weight", "scales"):
            self.unpack_()
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = self.packed.weight()
            destination[f"{prefix}scales"] = self.packed.scales()

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        layout = self.layout
        self.unpack_()
        super()._load_from_state_dict(*args, **options)
        self._packed_again(layout)


def choose_layout(silent: float | None) -> str:
    """The layout that is faster for one token at a time.

    Args:
        silent: share of the counts that are zero, as measured; None if it is not known.
    """
    return "in_out" if silent is not None and silent >= EVENT_DRIVEN_FROM else "out_in"


def pack_model(model: nn.Module, firing: Mapping[str, float] | None = None) -> int:
    """Pack every int8 matrix that counts are multiplied with, each in the layout that suits its input.

    All share one allocation, in the order of the model. Matrices without a neuron in front stay as they are.

    Args:
        model: a model on the CPU, or what wraps one (:mod:`spikelm.hf`).
        firing: path of a projection in the model -> silent share of its input counts; None for the model's
            ``firing``, what its checkpoint says. What is not listed is dense.

    Returns:
        Matrices that were packed.

    Raises:
        KernelError: an unknown path, weights that are not on the CPU, or C that cannot be compiled here.
    """
    silent = dict(_firing_of(model) if firing is None else firing)
    found: dict[str, Int8Linear] = {}
    paths = set()
    for name, module in model.named_modules():
        linear, neuron = getattr(module, "linear", None), getattr(module, "neuron", None)
        path = getattr(module, "path", "") or name  # a wrapper's names begin with its own
        if neuron is not None:
            paths.add(path)
        if isinstance(linear, Int8Linear) and getattr(neuron, "spiking", False):
            found[path] = linear
    for path in silent:
        if path not in paths:
            raise KernelError(nearest("projection", path, sorted(paths)))
    layouts = {path: choose_layout(silent.get(path)) for path in found}
    size = sum(
        aligned(packed_bytes(linear.out_features, linear.in_features, linear.group_size, layouts[path]))
        for path, linear in found.items()
    )
    arena = Arena(size)
    for path, linear in found.items():
        linear.pack_(layouts[path], arena)
    return len(found)


def _firing_of(model: nn.Module) -> Mapping[str, float]:
    """What the checkpoint of a model says of its inputs, also through what wraps the model."""
    found = (getattr(module, "firing", None) for module in model.modules())
    return next((firing for firing in found if firing is not None), {})


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
