"""A trained model with spikes before its projections, and int8 weights: what is converted, and how.

- A projection without a neuron, or with ``adaptive``, gets ``adaptive`` with its own k and cap.
- A projection whose neuron is binary (lif, heaviside, ...) has spikes as its input already and keeps it.
- The head keeps what it has unless asked for.
- What a part keeps in full precision (the router of a mixture of experts) stays as it is.
- A model that spikes AFTER its parts cannot be expressed so: one placement is one neuron for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spikelm.checkpoint import check_weights
from spikelm.config import FLOAT, ModelConfig
from spikelm.errors import ConfigError
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.quantisation.calibration import Sample
from spikelm.quantisation.search import CAPS, Choice, Trial, allocate
from spikelm.recurrence import EMPTY
from spikelm.weights import Int8Linear, dequantise, quantise

Advance = Callable[[int], None]
Int8Weights = Mapping[str, tuple[Tensor, Tensor]]
"""Path -> int8 values [O, D] and float32 scales [O, groups]."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Args:
        k: counts of a channel of mean magnitude; the mean that the search redistributes.
        dead_zone: of every new neuron; None keeps that of a projection's own ``adaptive``, else 0.
        weights: ``int8`` or ``float``.
        group_size: inputs that share an int8 scale, None for one scale per output.
        head: whether the head is converted, too.
        search: whether k, cap and the clipping of weights are searched per projection.
    """

    k: float = 3.0
    dead_zone: float | None = None
    weights: str = "int8"
    group_size: int | None = 128
    head: bool = False
    search: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
            ConfigError: naming the value.
        """
        if not 0 < self.k <= CAPS[-1]:
            raise ConfigError(f"k is {self.k:g}; expected a number above 0 and up to {CAPS[-1]} (3 is usual)")
        if self.dead_zone is not None and not 0 <= self.dead_zone < 100:
            raise ConfigError(f"dead-zone is {self.dead_zone:g}; expected 0 or more mean magnitudes")
        if self.weights not in ("int8", "float"):
            raise ConfigError(f"weights {self.weights!r}; expected int8 or float")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group-size is {self.group_size}; expected a whole number from 1, or channel")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every projection gets.

    Args:
        choices: path -> neuron and its figures on the calibration rows.
        uniform: the same with one k for all.
        unseen: projections that saw no calibration token and get the k that was asked for.
        kept: path -> neuron that stays: a binary one, or any before weights in full precision.
        exact: those among them whose weights stay float.
        sizes: path -> weights of the projection, for means weighted by multiply-accumulates.
    """

    choices: Mapping[str, Choice]
    uniform: Mapping[str, Choice]
    unseen: tuple[str, ...]
    kept: Mapping[str, str]
    exact: tuple[str, ...]
    sizes: Mapping[str, int]


def check_convertible(config: ModelConfig) -> None:
    """Refuse models that cannot be converted.

    Raises:
        ConfigError: the model spikes after its parts, has int8 weights already, or has a part whose own
            neurons depend on whether its projections have some.
    """
    if config.placement == "after" and config.neuron["name"] != "none":
        raise ConfigError(
            f"the checkpoint has neurons ({config.neuron['name']}) after its mixers and channels, which "
            "would be lost if they stood before projections; convert its continuous twin, or a model of "
            "placement 'before'"
        )
    if config.has_int8:
        raise ConfigError(
            "the checkpoint has int8 weights already; convert the float checkpoint that it was made from"
        )
    before = _outside_projections(config)
    spiking = dataclasses.replace(
        config, placement="before", neuron={"name": "adaptive"}, neuron_overrides={}
    )
    after = _outside_projections(spiking)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            raise ConfigError(
                f"{path} would be {after.get(path, 'nothing')} in place of {before.get(path, 'nothing')}: "
                "this part has neurons of its own once its projections spike, and they were not trained; "
                "convert the spiking model, not its continuous twin"
            )


def _outside_projections(config: ModelConfig) -> dict[str, str]:
    """Path -> class of every module of a model that is not part of a projection."""
    with torch.device("meta"):
        model = SpikeLM(config)
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Projection))
    return {
        path: type(module).__name__ for path, module in model.named_modules() if not path.startswith(inside)
    }


def convertible(model: SpikeLM, head: bool = False) -> tuple[dict[str, Projection], dict[str, str]]:
    """Projections that get ``adaptive``, and path -> neuron of those that keep theirs."""
    exact = in_full_precision(model)
    chosen: dict[str, Projection] = {}
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Projection) or (path == "head" and not head):
            continue
        if path in exact or (module.neuron.spiking and not hasattr(module.neuron, "cap")):
            kept[path] = str(model.config.input_neuron(path)["name"])
        else:
            chosen[path] = module
    return chosen, kept


def in_full_precision(model: SpikeLM) -> tuple[str, ...]:
    """Projections whose weights a part keeps in float32, whatever the rest of the model is."""
    kept = model.fp32_parameters()
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, Projection) and f"{path}.linear.weight" in kept
    )


def takes_int8(config: ModelConfig, path: str, request: Request) -> bool:
    """Whether the weights at a path become int8; a head that is tied to the embedding stays float."""
    if request.weights != "int8":
        return False
    return path != "head" or (request.head and not config.tie_word_embeddings)


@torch.no_grad()
def int8_weights(model: SpikeLM, samples: Mapping[str, Sample], request: Request) -> Int8Weights:
    """Int8 values and scales of every projection that takes them, whatever k will be.

    With the search, scales are clipped so as to suit the calibration rows.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    exact = in_full_precision(model)
    for path, module in model.named_modules():
        if not isinstance(module, Projection) or path in exact:
            continue
        if not takes_int8(model.config, path, request):
            continue
        weight = cast(Tensor, module.linear.weight).float()
        clip: float | str = "mse" if request.search else 1.0
        rows = samples[path].rows if path in samples and request.search else None
        importance = None if rows is None else rows.square().mean(0).to(weight.device)
        found[path] = quantise(weight, request.group_size, clip=clip, importance=importance)
    return found


@torch.no_grad()
def plan(
    model: SpikeLM,
    samples: Mapping[str, Sample],
    int8: Int8Weights,
    request: Request,
    advance: Advance | None = None,
) -> Plan:
    """Choose neurons for a model.

    Args:
        model: as it was trained.
        samples: its calibration.
        int8: its weights as :func:`int8_weights` gives them.
        request: what is asked for.
        advance: called with projections done.
    """
    projections, kept = convertible(model, request.head)
    exact = in_full_precision(model)
    uniform: dict[str, Choice] = {}
    options: dict[str, list[Choice]] = {}
    sizes = {path: module.in_features * module.out_features for path, module in projections.items()}
    unseen = tuple(path for path in projections if path not in samples)
    for path, sample in samples.items():
        trial = _trial(projections[path], sample, int8.get(path), request)
        dead_zone = _dead_zone(projections[path], request)
        uniform[path] = trial.choice(request.k, CAPS[-1], dead_zone)
        if request.search:
            options[path] = trial.candidates(request.k, dead_zone)
        if advance is not None:
            advance(1)
    if not request.search:
        return Plan(choices=uniform, uniform=uniform, unseen=unseen, kept=kept, exact=exact, sizes=sizes)
    budget = sum(sizes[path] * choice.ones for path, choice in uniform.items())
    choices = allocate(options, sizes, budget)
    for path, choice in choices.items():
        trial = _trial(projections[path], samples[path], int8.get(path), request)
        choices[path] = trial.capped(choice)
    return Plan(choices=choices, uniform=uniform, unseen=unseen, kept=kept, exact=exact, sizes=sizes)


def _trial(
    projection: Projection, sample: Sample, int8: tuple[Tensor, Tensor] | None, request: Request
) -> Trial:
    weight = cast(Tensor, projection.linear.weight)
    before = weight.detach().float().cpu()
    after = before if int8 is None else dequantise(*int8, request.group_size).cpu()
    spikes, scale, _ = projection.neuron.encode(sample.rows.to(weight.device), {}, EMPTY)
    target = (spikes if scale is None else spikes * scale).float().cpu()
    return Trial(sample, target, before, after)


def _dead_zone(projection: Projection, request: Request) -> float:
    if request.dead_zone is not None:
        return request.dead_zone
    return float(getattr(projection.neuron, "dead_zone", 0.0))


def spiking_config(config: ModelConfig, plan: Plan, request: Request) -> ModelConfig:
    """The configuration of the converted model."""
    overrides: dict[str, Any] = {}
    for path in plan.kept:
        overrides[path] = config.input_neuron(path)
    for path, choice in plan.choices.items():
        if path != "head":
            overrides[path] = choice.neuron()
    base: dict[str, Any] = {"name": "adaptive", "k": request.k}
    if request.dead_zone or "dead_zone" in config.neuron:
        base["dead_zone"] = config.neuron["dead_zone"] if request.dead_zone is None else request.dead_zone
    overrides = {path: spec for path, spec in overrides.items() if dict(spec) != base}
    head = plan.choices["head"].neuron() if "head" in plan.choices else config.input_neuron("head")
    weights: dict[str, Any] = {"name": request.weights}
    if request.weights == "int8":
        weights["group_size"] = request.group_size
    head_int8 = takes_int8(config, "head", request)
    return dataclasses.replace(
        config,
        placement="before",
        neuron=base,
        neuron_overrides=overrides,
        head_neuron=head,
        weights=weights,
        weight_overrides=({path: dict(FLOAT) for path in plan.exact} if request.weights == "int8" else {})
        | ({"head": weights} if head_int8 else {}),
    )


@torch.no_grad()
def convert(model: SpikeLM, int8: Int8Weights, plan: Plan, request: Request) -> SpikeLM:
    """The converted model, in evaluation mode; ``model`` stays as it is (float tensors are shared).

    Raises:
        CheckpointError: the weights do not fit the new configuration (a fault of this program).
    """
    config = spiking_config(model.config, plan, request)
    with torch.device("meta"):
        new = SpikeLM(config)
    wanted = new.state_dict()
    weights = {name: value for name, value in model.state_dict().items() if name in wanted}
    for path, module in new.named_modules():
        if isinstance(module, Projection) and isinstance(module.linear, Int8Linear):
            weights[f"{path}.linear.weight"], weights[f"{path}.linear.scales"] = int8[path]
    check_weights(new, weights, "the converted model")
    new.load_state_dict(weights, assign=True)
    new.tie_weights()
    return new.requires_grad_(False).eval()
