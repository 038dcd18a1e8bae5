"""Small mixtures of experts, and models with them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from spikelm.channels.moe import MoE
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM

D = 8
NONE = {"name": "none"}
ADAPTIVE = {"name": "adaptive", "dead_zone": 0.5}


def config(neuron: dict[str, Any] = NONE, layers: int = 1, **options: Any) -> ModelConfig:
    given = {"experts": 5, "top_k": 2, "hidden": 6, **options}
    return ModelConfig(
        vocab_size=11,
        hidden_size=D,
        num_hidden_layers=layers,
        layers=({"mixer": {"name": "wkv4"}, "channel": {"name": "moe", **given}},),
        neuron=neuron,
    )


def model(neuron: dict[str, Any] = NONE, layers: int = 1, **options: Any) -> SpikeLM:
    torch.manual_seed(3)
    return SpikeLM(config(neuron, layers, **options)).double()


def part(neuron: dict[str, Any] = NONE, **options: Any) -> MoE:
    return cast(MoE, model(neuron, **options).blocks[0].channel)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
