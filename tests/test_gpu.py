"""The model on another device gives what it gives on the CPU (``make gpu`` runs this on a GPU)."""

from __future__ import annotations

import pytest
import torch

from spikelm import state as states
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
from spikelm.recurrence import Context

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = {
    "counts": {"placement": "before", "neuron": {"name": "adaptive", "dead_zone": 1.0}},
    "binary": {"placement": "before", "neuron": {"name": "plif", "gain": 1.5}},
    "linear": {
        "neuron": {"name": "adaptive", "dead_zone": 1.0},
        "layers": [
            {"mixer": {"name": name, "short_convolution": 3}, "channel": {"name": "rwkv"}}
            for name in ("gla", "gla_tied")
        ],
    },
    "softmax": {
        "neuron": {"name": "adaptive", "dead_zone": 1.0},
        "layers": [
            {
                "mixer": {"name": "swa", "window": 5, "num_heads": 4, "num_kv_heads": 2},
                "channel": {"name": "rwkv"},
            },
            {"mixer": {"name": "attention", "num_heads": 4, "num_kv_heads": 2}, "channel": {"name": "rwkv"}},
        ],
    },
    "published": {"placement": "after", "neuron": {"name": "lif"}, "embedding_neuron": {"name": "heaviside"}},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", MODELS.values(), ids=list(MODELS))
def test_same_logits_state_and_gradients(options: dict[str, object], device: str) -> None:
    config = ModelConfig(vocab_size=13, hidden_size=16, num_hidden_layers=2, **options)  # type: ignore[arg-type]
    model = SpikeLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 13, (3, 17), generator=generator)
    ctx = Context(
        reset=torch.rand(3, 17, generator=generator) < 0.1, valid=torch.rand(3, 17, generator=generator) < 0.8
    )
    results = []
    for place in ("cpu", device):
        model.to(place).zero_grad()
        assert ctx.reset is not None and ctx.valid is not None
        here = Context(reset=ctx.reset.to(place), valid=ctx.valid.to(place))
        logits, state = model(tokens.to(place), ctx=here)
        step, _ = model(tokens[:, 0].to(place), model.reserve(state, tokens.shape[1] + 1))
        (logits.square().sum() + step.square().sum()).backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        flat = {name: value.detach().cpu() for name, value in states.flatten(state).items()}
        results.append({"logits": logits.detach().cpu(), "step": step.detach().cpu(), **flat, **gradients})
    expected, found = results
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m: f"{name}: {m}")  # noqa: B023
