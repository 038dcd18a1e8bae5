"""What a model is made of, told from its configuration alone.

The model is built on torch's meta device: shapes without memory, so 216M parameters cost nothing to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spikelm.config import ModelConfig, Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spikelm.block import Block

LENGTHS = (1_000, 100_000, 1_000_000)
"""Lengths of a text, in tokens, at which the size of its state is told."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block.

    Attributes:
        index: from 0.
        mixer: mixer and its options, as text.
        channel: channel and its options, as text.
        projections: path inside the block -> ``"in x out, neuron"`` (``"in x out, int8, neuron"``).
        parameters: parameters of the block.
        state_bytes: bytes of the block's state for one sequence.
    """

    index: int
    mixer: str
    channel: str
    projections: Mapping[str, str]
    parameters: int
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``spikelm inspect`` shows.

    Attributes:
        name: preset, file or folder that was given.
        config: the model's configuration.
        parameters: number of them, tied ones once, int8 weights included.
        active_parameters: those that one token uses: of routed experts only top_k count.
        parameters_by_kind: embedding, mixer, channel, norm, neuron, head.
        weight_bytes: memory of the weights as built: 4 bytes each, 1 and their scales where they are int8.
        neurons: place -> neuron and its options, as text.
        state_bytes: bytes of one sequence's state, float32; for models that grow, without what grows.
        state_bytes_by_kind: the same, by what is remembered.
        growth_bytes: further bytes of state per token (0: memory is constant).
        state_bytes_at: tokens of a text -> bytes of its state, for LENGTHS.
        layers: every block.
        weights: file size and dtypes of a checkpoint's weights; None for a bare configuration.
    """

    name: str
    config: ModelConfig
    parameters: int
    active_parameters: int
    parameters_by_kind: Mapping[str, int]
    weight_bytes: int
    neurons: Mapping[str, str]
    state_bytes: int
    state_bytes_by_kind: Mapping[str, int]
    growth_bytes: int
    state_bytes_at: Mapping[int, int]
    layers: tuple[Layer, ...]
    weights: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "parameters_by_kind": dict(self.parameters_by_kind),
            "weight_bytes": self.weight_bytes,
            "state_bytes": self.state_bytes,
            "state_bytes_by_kind": dict(self.state_bytes_by_kind),
            "growth_bytes_per_token": self.growth_bytes,
            "state_bytes_at": {str(length): size for length, size in self.state_bytes_at.items()},
            "placement": self.config.placement,
            "neurons": dict(self.neurons),
            "layers": [
                {
                    "index": layer.index,
                    "mixer": layer.mixer,
                    "channel": layer.channel,
                    "projections": dict(layer.projections),
                    "parameters": layer.parameters,
                    "state_bytes": layer.state_bytes,
                }
                for layer in self.layers
            ],
            "weights": None if self.weights is None else dict(self.weights),
            "config": self.config.to_dict(),
        }


def inspect_model(name: str | Path) -> Inspection:
    """Look at a checkpoint folder, a preset of configs/models, or a YAML file.

    Raises:
        ConfigError: no such preset or file, or a configuration that cannot be built.
        CheckpointError: a folder that is no checkpoint.
    """
    if Path(name).is_dir():
        from spikelm.checkpoint import read_config

        return inspect_config(read_config(Path(name)), name=str(name), weights=_weights(Path(name)))
    return inspect_config(ModelConfig.from_yaml(name), name=str(name))


def inspect_config(
    config: ModelConfig, *, name: str = "model", weights: Mapping[str, Any] | None = None
) -> Inspection:
    """Look at a configuration.

    Raises:
        ConfigError: an unknown part or option.
    """
    import torch

    from spikelm.block import Block
    from spikelm.channels.experts import active_parameters
    from spikelm.model import SpikeLM
    from spikelm.state import flatten, state_bytes

    with torch.device("meta"):
        model = SpikeLM(config)
    grows = model.grows
    state = model.empty_state(1, max_len=1 if grows else None)
    # A state whose size depends on max_len is measured twice, and what one more position adds is split off.
    growth = state_bytes(model.empty_state(1, max_len=2)) - state_bytes(state) if grows else 0
    by_kind: dict[str, int] = {}
    for path, parameter in _matrices(model):
        kind = _kind(path)
        by_kind[kind] = by_kind.get(kind, 0) + parameter.numel()
    held = [*model.parameters(), *model.buffers()]
    memory: dict[str, int] = {}
    for path, tensor in flatten(state).items():
        kind = path.rpartition(".")[2]
        memory[kind] = memory.get(kind, 0) + tensor.numel() * tensor.element_size()
    layers = tuple(
        _layer(config, cast(Block, block), index, grows) for index, block in enumerate(model.blocks)
    )
    return Inspection(
        name=name,
        config=config,
        parameters=model.num_parameters(),
        active_parameters=active_parameters(model),
        parameters_by_kind=by_kind,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
        neurons=_neurons(config),
        state_bytes=state_bytes(state) - growth,
        state_bytes_by_kind=memory,
        growth_bytes=growth,
        state_bytes_at={length: state_bytes(model.empty_state(1, max_len=length)) for length in LENGTHS},
        layers=layers,
        weights=weights,
    )


def _layer(config: ModelConfig, block: Block, index: int, grows: bool) -> Layer:
    from spikelm.projection import Projection
    from spikelm.state import state_bytes

    projections = {}
    for path, module in block.named_modules():
        if isinstance(module, Projection):
            full = f"blocks.{index}.{path}"
            held, neuron = config.projection_weights(full), describe(config.input_neuron(full))
            kind = "" if held["name"] == "float" else f"{describe(held)}, "
            projections[path] = f"{module.in_features} x {module.out_features}, {kind}{neuron}"
    return Layer(
        index=index,
        mixer=describe(config.layer(index)["mixer"]),
        channel=describe(config.layer(index)["channel"]),
        projections=projections,
        parameters=sum(tensor.numel() for _, tensor in _matrices(block)),
        state_bytes=state_bytes(block.init_state(1, "meta", max_len=1 if grows else None)),
    )


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Named parameters, and the int8 weights that torch holds as buffers."""
    from spikelm.weights import Int8Linear

    yield from module.named_parameters()
    for path, child in module.named_modules():
        if isinstance(child, Int8Linear):
            yield f"{path}.weight", child.weight


def _neurons(config: ModelConfig) -> dict[str, str]:
    place = (
        "before every projection of the blocks"
        if config.placement == "before"
        else "after every mixer and channel"
    )
    neurons = {
        "embedding": describe(config.embedding_neuron),
        place: describe(config.neuron),
        "head": describe(config.input_neuron("head")),
    }
    return neurons | {pattern: describe(spec) for pattern, spec in config.neuron_overrides.items()}


def describe(spec: Spec) -> str:
    """A named part with its options in one line: ``adaptive(k=3.0, cap=127)``."""
    options = ", ".join(
        f"{key}={float(f'{value:.4g}') if isinstance(value, float) else value}"
        for key, value in spec.items()
        if key != "name"
    )
    return f"{spec['name']}({options})" if options else str(spec["name"])


def _kind(path: str) -> str:
    """Kind of a parameter by its dotted name, for example ``blocks.0.mixer.key.linear.weight``: mixer."""
    words = path.split(".")
    if any(word.endswith("neuron") for word in words):
        return "neuron"
    if any(word.endswith("norm") for word in words):
        return "norm"
    return words[2] if words[0] == "blocks" else words[0]


def _weights(folder: Path) -> dict[str, Any] | None:
    """File size and dtypes of a checkpoint's weights, read from the file's header."""
    from safetensors import safe_open

    from spikelm.errors import CheckpointError

    files = sorted(folder.glob("model*.safetensors"))
    dtypes: dict[str, int] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (this object is no mapping)
                    view = tensors.get_slice(key)
                    count = 1
                    for size in view.get_shape():
                        count *= size
                    dtypes[view.get_dtype()] = dtypes.get(view.get_dtype(), 0) + count
        except Exception as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    if not files:
        return None
    return {
        "files": [file.name for file in files],
        "bytes": sum(f.stat().st_size for f in files),
        "dtypes": dtypes,
    }
