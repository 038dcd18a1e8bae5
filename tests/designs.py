"""Small models of every design."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.model import SpikeLM

SMALL = {"vocab_size": 19, "hidden_size": 12, "num_hidden_layers": 3}
DESIGNS: dict[str, dict[str, Any]] = {
    "published": {
        "placement": "after",
        "neuron": {"name": "lif"},
        "embedding_neuron": {"name": "heaviside"},
    },
    "spike-driven": {"neuron": {"name": "adaptive", "dead_zone": 1.0}},
    "binary": {"neuron": {"name": "plif", "gain": 2.0}, "head_neuron": {"name": "lif", "threshold": 0.5}},
    "twin": {"neuron": {"name": "none"}},
}


def small(design: str = "spike-driven", **values: Any) -> SpikeLM:
    torch.manual_seed(2)
    model = SpikeLM(ModelConfig.from_dict({**SMALL, **DESIGNS[design], **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 19, shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
