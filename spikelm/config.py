"""The configuration of a model: one flat frozen value, with parts named per layer.

Standard library only, so that a model can be described and built with torch alone; YAML is read lazily.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spikelm.errors import ConfigError, nearest

FORMAT_VERSION = 2
Spec = Mapping[str, Any]
"""A named part with its options, for example {"name": "lif", "tau": 2.0}."""

NO_NEURON: Spec = {"name": "none"}
FLOAT: Spec = {"name": "float"}
NORMS = ("layernorm", "rmsnorm")


def _default_layers() -> tuple[Mapping[str, Spec], ...]:
    return ({"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv"}},)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to build a model.

    Args:
        vocab_size: tokens.
        hidden_size: D.
        num_hidden_layers: blocks.
        layers: pattern of {"mixer": spec, "channel": spec}, repeated until all blocks have one.
        placement: ``before``: the neuron stands before every projection of the blocks (spike-driven);
            ``after``: it stands on the output of every mixer and channel (SpikeGPT as published).
        neuron: the neuron of that placement.
        neuron_overrides: path pattern -> neuron, for input neurons of single projections, for example
            {"blocks.*.channel.value": {"name": "adaptive", "k": 1.0}}; the first match counts.
        embedding_neuron: neuron on the embedding (``heaviside``: binary embedding; ``none``: dense).
        head_neuron: input neuron of the head.
        tie_word_embeddings: whether the head shares the embedding's weights.
        norm: ``layernorm``, or ``rmsnorm`` (Llama, Qwen, SpikingBrain), before mixers, channels and the head.
        embedding_norm: whether the embedding is normalised (RWKV-4) before the first block.
        layer_norm_epsilon: of every norm.
        initializer_range: standard deviation of every projection, the embedding and the head; None for the
            scheme of RWKV-4 (see ``spikelm.initialisation``).
        sink_tokens: learned vectors that stand before every text.
        weights: how the projections of the blocks hold their weights: {"name": "float"}, or
            {"name": "int8", "group_size": 128} for inference.
        weight_overrides: path pattern -> the same for single projections; the head is float unless named.
        dropout: share of features dropped after every block in training.
        bos_token_id: first token of a text, or None.
        eos_token_id: end of a text, or None.
        pad_token_id: padding, or None.
    """

    vocab_size: int = 256
    hidden_size: int = 512
    num_hidden_layers: int = 12
    layers: tuple[Mapping[str, Spec], ...] = field(default_factory=_default_layers)
    placement: str = "before"
    neuron: Spec = field(default_factory=lambda: {"name": "adaptive", "k": 3.0, "dead_zone": 1.4})
    neuron_overrides: Mapping[str, Spec] = field(default_factory=dict)
    embedding_neuron: Spec = field(default_factory=lambda: dict(NO_NEURON))
    head_neuron: Spec = field(default_factory=lambda: dict(NO_NEURON))
    tie_word_embeddings: bool = False
    norm: str = "layernorm"
    embedding_norm: bool = True
    layer_norm_epsilon: float = 1e-5
    initializer_range: float | None = None
    sink_tokens: int = 0
    weights: Spec = field(default_factory=lambda: dict(FLOAT))
    weight_overrides: Mapping[str, Spec] = field(default_factory=dict)
    dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field, what was got and what was expected.
        """
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            value = getattr(self, name)
            if not _whole(value) or not 1 <= value < 2**24:
                raise ConfigError(f"{name} is {value!r}; expected a whole number from 1 to {2**24 - 1}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 0 <= value < self.vocab_size):
                raise ConfigError(
                    f"{name} is {value!r}; expected a token of the vocabulary (0 to {self.vocab_size - 1})"
                )
        if self.placement not in ("before", "after"):
            raise ConfigError(f"placement is {self.placement!r}; expected 'before' or 'after'")
        if self.norm not in NORMS:
            raise ConfigError(f"norm is {self.norm!r}; expected {' or '.join(map(repr, NORMS))}")
        if not _whole(self.sink_tokens) or not 0 <= self.sink_tokens < 2**16:
            raise ConfigError(f"sink_tokens is {self.sink_tokens!r}; expected a whole number from 0 to 65535")
        scale = self.initializer_range
        if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale <= 10):
            raise ConfigError(f"initializer_range is {scale!r}; expected a number from 0 to 10, or null")
        for name, low, high in (("layer_norm_epsilon", 0.0, 1.0), ("dropout", 0.0, 0.999)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}; expected a number from {low} to {high}")
        if not isinstance(self.layers, (list, tuple)) or not self.layers:
            raise ConfigError(f"layers is {self.layers!r}; expected a list of {{mixer: ..., channel: ...}}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.layers) > self.num_hidden_layers:
            raise ConfigError(
                f"layers has {len(self.layers)} entries for {self.num_hidden_layers} blocks; "
                "expected a pattern that is at most as long as num_hidden_layers"
            )
        for name in ("tie_word_embeddings", "embedding_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false")
        for layer in self.layers:
            if not isinstance(layer, Mapping) or set(layer) != {"mixer", "channel"}:
                raise ConfigError(f"a layer is {layer!r}; expected exactly the keys mixer and channel")
        for name in ("neuron", "embedding_neuron", "head_neuron", "weights"):
            check_spec(name, getattr(self, name))
        for layer in self.layers:
            for name, spec in layer.items():
                check_spec(name, spec)
        for key in ("neuron_overrides", "weight_overrides"):
            overrides = getattr(self, key)
            if not isinstance(overrides, Mapping):
                raise ConfigError(f"{key} is {overrides!r}; expected a mapping of path patterns to parts")
            for name, spec in overrides.items():
                check_spec(f"{key}[{name!r}]", spec)

        if self.tie_word_embeddings and self.projection_weights("head")["name"] == "int8":
            raise ConfigError(
                "tie_word_embeddings is true and weight_overrides makes the head int8; the embedding is "
                "float, so untie them (tie_word_embeddings: false) or leave the head float"
            )

    def layer(self, index: int) -> Mapping[str, Spec]:
        """Mixer and channel of block ``index``."""
        return self.layers[index % len(self.layers)]

    def input_neuron(self, path: str) -> Spec:
        """The input neuron of the projection at a dotted path."""
        for pattern, spec in self.neuron_overrides.items():
            if fnmatchcase(path, pattern):
                return spec
        if path == "head":
            return self.head_neuron
        return self.neuron if self.placement == "before" else NO_NEURON

    def projection_weights(self, path: str) -> Spec:
        """How the projection at a dotted path holds its weights."""
        for pattern, spec in self.weight_overrides.items():
            if fnmatchcase(path, pattern):
                return spec
        return FLOAT if path == "head" else self.weights

    @property
    def has_int8(self) -> bool:
        """Whether some weights are int8 (for inference; they cannot be trained)."""
        return any(spec["name"] == "int8" for spec in (self.weights, *self.weight_overrides.values()))

    def twin(self) -> ModelConfig:
        """The continuous twin: the same model with every neuron off, those inside parts included."""
        return dataclasses.replace(
            self,
            neuron=NO_NEURON,
            embedding_neuron=NO_NEURON,
            head_neuron=NO_NEURON,
            neuron_overrides={},
            layers=tuple(_without_neurons(layer) for layer in self.layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration of plain values.

        Raises:
            ConfigError: for an unknown key (the nearest known one is named) or a bad value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(nearest("model configuration key", str(key), known))
        return cls(**values)

    @classmethod
    def from_yaml(cls, name: str | Path, **overrides: Any) -> ModelConfig:
        """A preset by name, or a YAML file by path, with single keys replaced.

        Raises:
            ConfigError: if there is no such preset or file, or its content does not fit.
        """
        from spikelm.presets import find
        from spikelm.yaml_values import read_yaml

        return cls.from_dict({**read_yaml(find("models", name)), **overrides})


def check_spec(where: str, spec: object) -> None:
    """Refuse what is not a mapping with a name.

    Raises:
        ConfigError: naming ``where``, the place in the configuration.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(
            f"{where} is {spec!r}; expected a mapping with a name, such as {{name: {_example(where)}}}"
        )


def _example(where: str) -> str:
    """Name of a part that could stand at this place."""
    word = where.rpartition(".")[2].rstrip("0123456789")
    examples = {"mixer": "gla", "branch": "gla", "channel": "swiglu", "weights": "int8"}
    return examples.get(word, "int8" if "weight_overrides" in where else "adaptive")


def _without_neurons(value: Any) -> Any:
    """Options of parts with every neuron among them, however deep, replaced by ``none``."""
    if isinstance(value, Mapping):
        return {
            key: dict(NO_NEURON)
            if (key == "neuron" or key.endswith("_neuron")) and isinstance(entry, Mapping)
            else _without_neurons(entry)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_neurons(entry) for entry in value]
    return value


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
