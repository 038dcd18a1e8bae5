"""Small RWKV models of every kind that a decode plan must run, and the model's own step beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm import state as states
from spikelm.config import ModelConfig
from spikelm.decoding import DecodePlan
from spikelm.model import SpikeLM
from spikelm.state import State
from spikelm.weights import Int8Linear

VOCABULARY = 61
INT8: dict[str, Any] = {"weights": {"name": "int8", "group_size": 16}}
INT8_HEAD: dict[str, Any] = {
    "head_neuron": {"name": "adaptive", "k": 3.0},
    "weight_overrides": {"head": {"name": "int8", "group_size": None}},
}
NEURONS: dict[str, dict[str, Any]] = {
    "adaptive": {"name": "adaptive", "k": 3.0, "dead_zone": 1.4},
    "adaptive-uncapped": {"name": "adaptive", "k": 60.0, "cap": None},
    "lif": {"name": "lif", "tau": 2.0, "threshold": 0.3},
    "lif-soft": {"name": "lif", "tau": 1.5, "threshold": 0.3, "reset": "soft", "decay_input": False},
    "plif-gain": {"name": "plif", "tau": 2.0, "gain": 2.5, "v_reset": -0.1},
    "if": {"name": "if", "threshold": 0.8},
    "heaviside": {"name": "heaviside", "threshold": 0.1, "gain": 1.5},
    "none": {"name": "none"},
}


def model_of(seed: int = 0, **options: Any) -> SpikeLM:
    """A model whose parameters are all random and whose sizes are no multiples of a vector.

    The width is 40; ``expand`` 2.6 makes the hidden layer 104 wide.
    """
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "layers": [{"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv", "expand": 2.6}}],
    }
    model = SpikeLM(ModelConfig(**{**defaults, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            if "mix_" in name:
                parameter.uniform_(0.0, 1.0)
        model.embedding.weight.normal_()
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.load_float(torch.randn(module.out_features, module.in_features) / 6)
    return model


def tokens_of(rows: int, steps: int, seed: int = 0) -> Tensor:
    """Random tokens [rows, steps]."""
    return torch.randint(0, VOCABULARY, (rows, steps), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_python(model: SpikeLM, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Logits [B, T, V] token by token as generation without a plan computes them, and the last state."""
    state = model.init_state(tokens.shape[0]) if state is None else state
    logits = []
    for t in range(tokens.shape[1]):
        y, state = model(tokens[:, t : t + 1], state)
        logits.append(y)
    return torch.cat(logits, 1), state


def in_plan(plan: DecodePlan, tokens: Tensor, slots: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of tokens [B, T]."""
    return torch.stack([plan.step(column.contiguous(), slots).clone() for column in tokens.unbind(1)], 1)


def same_state(a: State, b: State) -> bool:
    """Whether two states have the same names and bits."""
    flat_a, flat_b = states.flatten(a), states.flatten(b)
    return flat_a.keys() == flat_b.keys() and all(torch.equal(flat_a[name], flat_b[name]) for name in flat_a)


def row_of(state: State, row: int) -> State:
    """One sequence of a state."""
    return states.select_rows(state, torch.tensor([row]))
