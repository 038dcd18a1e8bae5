"""Small transformers models of every design."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.hf import (
    SpikeLMConfig,
    SpikeLMForCausalLM,
)

SMALL = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2}
SD = {"placement": "before", "neuron": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0}}
LIF = {"placement": "after", "neuron": {"name": "lif"}, "embedding_neuron": {"name": "heaviside"}}
TWIN = {"placement": "before", "neuron": {"name": "none"}}
PLIF = {"placement": "after", "neuron": {"name": "plif", "gain": 1.0}}


def small(**values: object) -> SpikeLMForCausalLM:
    torch.manual_seed(3)
    model = SpikeLMForCausalLM(SpikeLMConfig(**SMALL, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(1))
