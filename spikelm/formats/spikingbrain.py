"""SpikingBrain-7B folders as published: ``gla_swa`` in bfloat16, and its quantised form W8ASpike.

The folder's own code and ``auto_map`` are never looked at; see :mod:`spikelm.formats.safetensors_folder`.
Tensors are read one at a time, when they are asked for. What the releases compute and where this model
differs: docs/spikingbrain.md.

W8ASpike's integers n = round(weight / scale) are not bounded by its code, and about 1% of the published ones
lie beyond int8 (up to 194). Groups that hold such a one get the smallest scale that fits, max|weight| / 127,
and are rounded again; the others are taken as they are. ``quantised=False`` keeps n * scale as floats,
which is what the release multiplies with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spikelm.config import NO_NEURON, ModelConfig, Spec
from spikelm.errors import CheckpointError, ConfigError, nearest
from spikelm.formats.safetensors_folder import SafetensorsFolder
from spikelm.formats.spikingbrain_config import read_published
from spikelm.formats.spikingbrain_names import SCALES, Entry, Layout, entries
from spikelm.weights import FLOAT

LARGEST = 127
GROUP = 128
"""Weights per scale where the folder's scales leave it open (its projections are no wider than a group)."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What became of W8ASpike's integers.

    Attributes:
        weights: quantised ones.
        outside: those whose published integer is beyond 127 in magnitude.
        groups: groups of weights that share a scale.
        widened: groups that got a larger scale because of them.
    """

    weights: int = 0
    outside: int = 0
    groups: int = 0
    widened: int = 0

    def __add__(self, other: Quantisation) -> Quantisation:
        """The sum over two tensors."""
        return Quantisation(
            weights=self.weights + other.weights,
            outside=self.outside + other.outside,
            groups=self.groups + other.groups,
            widened=self.widened + other.widened,
        )


@dataclass(kw_only=True)
class SpikingBrain:
    """An open folder. Close it, or use it in a ``with`` statement.

    Attributes:
        config: the model of ours that its weights belong to.
        layout: which variant the folder holds.
        quantisation: what became of the integers of the tensors read so far.
    """

    config: ModelConfig
    layout: Layout
    files: SafetensorsFolder
    plan: tuple[Entry, ...]
    group: int
    int8: bool
    quantisation: Quantisation = field(default_factory=Quantisation)

    def __enter__(self) -> SpikingBrain:
        """The open folder."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        self.files.__exit__(None, None, None)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our parameter names with their tensors, in the order of the model, each read when it is its turn.

        Float tensors keep the dtype they are stored in; int8 ones come with float32 scales [O, groups].

        Raises:
            CheckpointError: a damaged file, a value that is not finite, or a scale that is not positive.
        """
        for entry in self.plan:
            weight = self._finite(entry.published)
            if entry.quantiser is None:
                yield entry.ours, weight
                continue
            scales = self._finite(entry.quantiser).reshape(entry.shape[0], -1).float()
            if not bool((scales > 0).all()):
                raise CheckpointError(f"{entry.quantiser!r} holds scales that are not positive")
            if self.int8 and not self._dense(entry):
                integers, scales, told = to_int8(weight, scales, self.group)
                self.quantisation += told
                yield entry.ours, integers
                yield entry.ours.removesuffix("weight") + "scales", scales
            else:
                # The release's down projection goes by its quantiser: dense means the weight as it is stored.
                yield entry.ours, weight if self._dense(entry) else rounded(weight, scales, self.group)

    @property
    def parameters(self) -> int:
        """Published parameters, quantised ones among them, scales not."""
        return sum(math.prod(entry.shape) for entry in self.plan)

    def _dense(self, entry: Entry) -> bool:
        return entry.ours.endswith("channel.down.linear.weight") and bool(self.config.neuron_overrides)

    def _finite(self, name: str) -> Tensor:
        value = self.files.tensor(name)
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"the tensor {name!r} holds values that are not finite; expected finite weights"
            )
        return value


def open_spikingbrain(
    folder: Path, *, k: float | None = None, weights: str | None = None, dense_down: bool = False
) -> SpikingBrain:
    """Open a published folder and check every name, shape and dtype; tensors are read later.

    Args:
        folder: with config.json and safetensors.
        k: of the adaptive neuron before every projection; None: 3 for W8ASpike, no neuron for the float
            release, which has none. 0: no neuron.
        weights: ``int8`` (the default of W8ASpike) or ``float``, for W8ASpike alone.
        dense_down: leave the down projection of SwiGLU without neuron and in float, as the code of the
            W8ASpike release runs it.

    Raises:
        CheckpointError: a folder that is not of this kind, or is incomplete.
        ConfigError: options that do not fit the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; expected one with config.json and safetensors")
    if weights not in (None, "int8", "float"):
        raise ConfigError(nearest("kind of weights", str(weights), ("int8", "float")))
    published = read_published(folder)
    files = SafetensorsFolder(folder)
    try:
        layout = Layout.of(files.files)
        plan = tuple(entries(published, layout))
        _check_names(folder, files, plan)
        if not layout.quantised and (weights == "int8" or dense_down):
            raise ConfigError(
                f"{folder} holds float weights without scales; --weights int8 and --dense-down belong to "
                "W8ASpike (spikelm convert spike quantises a converted checkpoint)"
            )
        k = (3.0 if layout.quantised else 0.0) if k is None else k
        int8 = layout.quantised and weights != "float"
        if int8 and k == 0:
            raise ConfigError("int8 weights take spike counts; give --k above 0, or --weights float")
        group = _group(files, plan, published.group)
        neuron: Spec = {"name": "adaptive", "k": k, "dead_zone": 0.0} if k else NO_NEURON
        down = {"blocks.*.channel.down": NO_NEURON} if dense_down else {}
        float_down = {"blocks.*.channel.down": dict(FLOAT)} if dense_down and int8 else {}
        config = published.model(
            gate_rank=None if layout.merged_gate else published.gate_rank,
            neuron=neuron,
            weights={"name": "int8", "group_size": group} if int8 else dict(FLOAT),
            neuron_overrides=down,
            weight_overrides=float_down,
        )
        return SpikingBrain(config=config, layout=layout, files=files, plan=plan, group=group, int8=int8)
    except BaseException:
        files.__exit__(None, None, None)
        raise


def to_int8(weight: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor, Quantisation]:
    """Integers and scales of a quantised matrix.

    Args:
        weight: floats [O, D] as stored.
        scales: float32 [O, D / group].
        group: neighbouring inputs that share a scale.

    Returns:
        int8 [O, D] within [-127, 127], float32 scales [O, D / group], and what was changed.
    """
    grouped = weight.float().unflatten(1, (-1, group))
    outside = (grouped / scales[..., None]).round_().abs() > LARGEST
    wide = outside.any(-1)
    scales = torch.where(wide, grouped.abs().amax(-1) / LARGEST, scales)
    integers = (grouped / scales[..., None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8).flatten(1)
    told = Quantisation(
        weights=weight.numel(), outside=int(outside.sum()), groups=wide.numel(), widened=int(wide.sum())
    )
    return integers, scales, told


def rounded(weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """What the release multiplies with, round(w / scale) * scale, in the dtype of the weight."""
    grouped = weight.unflatten(1, (-1, group))
    value: Tensor = (grouped / scales[..., None]).round() * scales[..., None]
    return value.flatten(1).to(weight.dtype)


def _check_names(folder: Path, files: SafetensorsFolder, plan: tuple[Entry, ...]) -> None:
    """Every tensor there, none unknown, all of the right shape and floating."""
    wanted = {entry.published for entry in plan} | {entry.quantiser for entry in plan if entry.quantiser}
    for name in sorted(files.files):
        if name not in wanted:
            raise CheckpointError(
                f"{folder}: {nearest('tensor', name, _near(name, wanted))} (a model of these sizes has "
                f"{len(wanted)} tensors)"
            )
    for entry in plan:
        for name in filter(None, (entry.published, entry.quantiser)):
            if name not in files.files:
                raise CheckpointError(f"{folder}: the tensor {name!r} is missing; the folder is incomplete")
            if not files.dtype(name).is_floating_point:
                raise CheckpointError(
                    f"{folder}: the tensor {name!r} is {files.dtype(name)}; expected floats, as published"
                )
        if files.shape(entry.published) != entry.shape:
            raise CheckpointError(
                f"{folder}: the tensor {entry.published!r} has shape {list(files.shape(entry.published))}; "
                f"config.json asks for {list(entry.shape)}"
            )


def _near(name: str, wanted: set[str]) -> list[str]:
    """Names worth listing in an error about ``name``: those of the same place in the model."""
    place = name.rpartition(".")[0].rpartition(".")[0]
    return sorted(other for other in wanted if place and other.startswith(place))[:6] or sorted(wanted)[:6]


def _group(files: SafetensorsFolder, plan: tuple[Entry, ...], told: int | None) -> int:
    """Weights per scale: one number for the whole model."""
    found: dict[int, str] = {}
    for entry in plan:
        if entry.quantiser is None:
            continue
        outputs, inputs = entry.shape
        shape = files.shape(entry.quantiser)
        fits = len(shape) == 3 and shape[0] == outputs and shape[2] == 1 and shape[1] >= 1
        if not fits or inputs % shape[1]:
            raise CheckpointError(
                f"the scales {entry.quantiser!r} have shape {list(shape)}; expected [{outputs}, groups, 1] "
                f"with a number of groups that divides {inputs}"
            )
        found.setdefault(inputs // shape[1], entry.quantiser)
    if told is not None:
        found.setdefault(told, "quant_weight_group_size of config.json")
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise CheckpointError(
            f"{first!r} has groups of {a} weights and {second!r} of {b}; expected one size for all ({SCALES})"
        )
    return next(iter(found), GROUP)
