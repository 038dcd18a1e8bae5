"""Every registered part, in the variants worth testing, built small and with random weights in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from spikelm.block import Block, build_child
from spikelm.config import ModelConfig
from spikelm.convolution import ShortConvolution
from spikelm.neurons.base import build_neuron
from spikelm.projection import Projection
from spikelm.recurrence import Part
from spikelm.registry import channels, mixers, neurons

D = 8
SURROGATES = ("atan", "sigmoid", "triangle", "straight_through")

# Variants beside the defaults; a new part is tested with its defaults without a line here.
NEURONS: dict[str, list[dict[str, Any]]] = {
    "lif": [
        {},
        {"tau": 3.5, "reset": "soft", "decay_input": False},
        {"detach_reset": True, "v_reset": -0.2, "threshold": 0.7},
        {"decay_input": False, "detach_reset": True, "reset": "soft", "gain": 1.5},
        *({"surrogate": name, "alpha": 1.3} for name in SURROGATES),
    ],
    "plif": [{}, {"gain": 2.0}, {"reset": "soft", "decay_input": False, "tau": 5.0}],
    "if": [{}, {"reset": "soft"}],
    "adaptive": [{}, {"dead_zone": 1.4}, {"k": 1.0, "cap": 1}, {"k": 2.5, "dead_zone": 0.3, "cap": 4}],
    "heaviside": [{}, {"threshold": 0.4, "gain": 2.0, "surrogate": "triangle"}],
}
MIXERS: dict[str, list[dict[str, Any]]] = {
    "ssa": [
        {},
        {
            "neuron": {"name": "lif", "threshold": 0.4},
            "num_heads": 2,
            "decay": "learned",
            "token_shift": True,
        },
        {"neuron": {"name": "heaviside"}, "num_heads": 4, "decay": "fixed", "mean": False, "norm": False},
        {
            "causal": False,
            "attention_neuron": {"name": "plif", "threshold": 0.3},
            "head_dim": 4,
            "scale": 2.0,
        },
    ],
    "sdsa": [
        {
            "neuron": {"name": "lif", "threshold": 0.4},
            "num_heads": 2,
            "decay": "learned",
            "token_shift": True,
        },
        {"version": 2, "neuron": {"name": "heaviside"}, "num_heads": 4, "decay": "fixed", "mean": False},
        {"version": 2, "norm": False},
        {"causal": False, "neuron": {"name": "heaviside"}},
    ],
    "gated_delta": [
        {},
        {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True, "short_convolution": 3},
        {"num_heads": 2, "num_kv_heads": 1, "rope": True, "allow_negative": True, "short_convolution": 0},
        {"head_dim": 2, "output_gate": False, "output_norm": False, "rope": True, "qk_norm": True},
    ],
    "gla": [
        {},
        {"num_heads": 4, "num_kv_heads": 2, "feature_map": "identity", "qkv_bias": True, "gate_rank": 3},
        {"head_dim": 2, "output_gate": "swish", "output_norm": False, "short_convolution": 3},
        {"num_heads": 2, "num_kv_heads": 1, "rope": True, "qk_norm": True, "feature_map": "sigmoid"},
        {"gate_rank": None, "gate_divisor": 0.1, "short_convolution": 4, "rope": True, "qkv_bias": True},
    ],
    "gla_tied": [
        {},
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "qkv_bias": True,
            "qk_norm": True,
            "output_gate": "swish",
            "rope": True,
            "short_convolution": 2,
        },
    ],
    "attention": [
        {"num_heads": 2, "qkv_bias": True},
        {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "output_gate": True, "output_bias": True},
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 4, "partial_rotary_factor": 0.5},
    ],
    "parallel": [
        {"branches": [{"name": "wkv4"}, {"name": "wkv4"}]},
        {"branches": [{"name": "swa", "window": 3}, {"name": "attention", "num_heads": 2}]},
    ],
    "swa": [
        {"window": 1},
        {"window": 2, "num_heads": 4, "num_kv_heads": 2},
        {"window": 3, "num_heads": 2, "qkv_bias": True, "output_bias": True, "rope": False},
        {"window": 4, "num_heads": 2, "num_kv_heads": 1, "qk_norm": True, "output_gate": True},
        {"window": 20, "num_heads": 2, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
}
CHANNELS: dict[str, list[dict[str, Any]]] = {
    "mlp": [{}, {"expand": 1.5, "norm": False, "activation": "none"}],
    "moe": [
        {"experts": 4, "hidden": 6},
        {"experts": 5, "top_k": 3, "hidden": 4, "shared": 2, "shared_hidden": 6, "router": "sigmoid"},
        {"experts": 3, "hidden": 4, "normalise_weights": False, "scale": 2.5, "loss_free_bias": 0.1},
        {"experts": 2, "top_k": 2, "hidden": 4},
    ],
    "swiglu": [{}, {"hidden": 5}],
}
# Experts refuse neurons with memory (tests/channels/test_moe.py); router and shared experts have them here.
OVERRIDES: dict[str, Any] = {"*.experts.*": {"name": "adaptive"}}
INPUT_NEURONS: list[dict[str, Any]] = [
    {"name": "none"},
    {"name": "adaptive", "dead_zone": 1.0},
    {"name": "plif", "gain": 1.5},
]


def randomise(part: nn.Module) -> None:
    """Weights in which nothing is zero and nothing is equal."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in part.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.5 * noise)


def cases() -> Iterator[tuple[str, Callable[[], Part]]]:
    """(test id, constructor) of every part."""
    for name in neurons.names():
        for options in NEURONS.get(name, [{}]):
            yield _id(name, options), _neuron(name, options)
    for neuron in INPUT_NEURONS:
        yield f"projection-{neuron['name']}", _projection(neuron)
        for kind, registry, variants in (("mixer", mixers, MIXERS), ("channel", channels, CHANNELS)):
            for name in registry.names():
                for options in variants.get(name, [{}]):
                    yield f"{_id(name, options)}-{neuron['name']}", _mixing(kind, name, options, neuron)
    yield "short_convolution", lambda: ShortConvolution(D, 4)
    yield "short_convolution-none", lambda: ShortConvolution(D, 2, activation="none", bias=True)
    yield "block-after", lambda: Block(_config(placement="after", neuron={"name": "lif"}), 0)
    yield "block-before", lambda: Block(_config(placement="before", neuron={"name": "adaptive"}), 1)


def _config(**values: Any) -> ModelConfig:
    return ModelConfig(vocab_size=11, hidden_size=D, num_hidden_layers=2, **values)


def _id(name: str, options: dict[str, Any]) -> str:
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


def _neuron(name: str, options: dict[str, Any]) -> Callable[[], Part]:
    return lambda: build_neuron({"name": name, **options}, D)


def _projection(neuron: dict[str, Any]) -> Callable[[], Part]:
    return lambda: Projection(D, 5, build_neuron(neuron, D), bias=True)


def _mixing(kind: str, name: str, options: dict[str, Any], neuron: dict[str, Any]) -> Callable[[], Part]:
    stateful = bool(build_neuron(neuron, D).init_state(1))
    config = _config(neuron=neuron, neuron_overrides=OVERRIDES if stateful else {})
    return lambda: build_child(config, 1, "blocks.1.", kind, kind, {"name": name, **options})
