"""Sink tokens: learned vectors before every text, which belong to the model's initial state."""

from __future__ import annotations

import pytest
import torch

from spikelm import state as states
from spikelm.channels.moe import MoE
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.model import SpikeLM
from spikelm.recurrence import Context


def make(**values: object) -> SpikeLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=17, hidden_size=16, num_hidden_layers=2, sink_tokens=3, initializer_range=0.3, **values
    )  # type: ignore[arg-type]
    return SpikeLM(config).double()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(17, (rows, length), generator=torch.Generator().manual_seed(1))


def test_the_initial_state_has_seen_the_sinks() -> None:
    model = make()
    with torch.no_grad():
        start = states.flatten(model.init_state(2))
        model.sinks.weight += 1.0
        moved = states.flatten(model.init_state(2))
    assert any(not torch.equal(start[name], moved[name]) for name in start)
    for value in start.values():
        assert torch.equal(value[0], value[1])


def test_sinks_are_a_prefix_for_parts_that_look_back_only() -> None:
    """With causal recurrent parts the sinks are tokens whose features are given."""
    model = make()
    x = tokens()
    logits, _ = model(x)
    with torch.no_grad():
        embedded = model.embedding_norm(model.embedding(x))
        h = torch.cat([model.sinks().expand(2, -1, -1), embedded], 1)
        for block in model.blocks:
            h, _ = block(h)
        expected = model.head(model.norm(h[:, 3:]))[0]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_sinks_learn() -> None:
    model = make()
    logits, _ = model(tokens())
    logits.square().mean().backward()
    assert model.sinks is not None and model.sinks.weight.grad is not None
    assert (model.sinks.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_every_packed_document_begins_after_the_sinks(padded: bool) -> None:
    model = make()
    x = tokens(3, 12)
    reset = torch.zeros(3, 12, dtype=torch.bool)
    reset[0, 4] = reset[1, 4] = reset[1, 7] = reset[2, 0] = True
    valid = torch.ones_like(reset)
    if padded:
        valid[1, 5] = valid[0, :2] = False
    _, before = model(tokens(3, 5))
    logits, end = model(x, before, Context(reset=reset, valid=valid if padded else None))
    alone, last = model(x[1:2, 7:])
    torch.testing.assert_close(logits[1:2, 7:], alone, rtol=1e-10, atol=1e-10)
    for name, value in states.flatten(last).items():
        torch.testing.assert_close(states.flatten(end)[name][1:2], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits[0:1, 4:], model(x[0:1, 4:])[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits[2:3], model(x[2:3])[0], rtol=1e-10, atol=1e-10)


def test_a_head_with_memory_starts_anew_with_every_document() -> None:
    model = make(head_neuron={"name": "lif"})
    x, reset = tokens(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 4] = True
    _, before = model(tokens(2, 6))
    logits, _ = model(x, before, Context(reset=reset))
    torch.testing.assert_close(logits[0:1, 4:], model(x[0:1, 4:])[0], rtol=1e-10, atol=1e-10)


def test_token_by_token_is_the_sequence() -> None:
    model = make()
    x = tokens()
    whole, end = model(x)
    state = model.init_state(2)
    for t in range(x.shape[1]):
        logits, state = model(x[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-10, atol=1e-10)
    for name, value in states.flatten(state).items():
        torch.testing.assert_close(states.flatten(end)[name], value, rtol=1e-10, atol=1e-10)


def test_recomputation_gives_the_same_gradients() -> None:
    model = make()
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 3] = True
    found = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(tokens(), None, Context(reset=reset))[0].square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [-1, 2.5, True, "3"])
def test_a_count_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="sink_tokens is .*; expected a whole number"):
        ModelConfig(sink_tokens=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("padded", [False, True])
def test_auxiliary_losses_of_pieces_add_up_to_one_mean(padded: bool) -> None:
    layers = ({"mixer": {"name": "wkv4"}, "channel": {"name": "moe", "experts": 3, "z_loss": 1.0}},)
    model = make(layers=layers, neuron={"name": "none"}).train()
    for part in model.modules():
        if isinstance(part, MoE):
            part.balance_loss = 0.0  # a product of two means; the z-loss is a mean over tokens
    x, reset = tokens(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 4] = reset[1, 7] = True
    valid = torch.ones_like(reset)
    if padded:
        valid[0, 8:] = False
    found: list[torch.Tensor] = []
    model(x, None, Context(reset=reset, valid=valid if padded else None, losses=found))
    alone = 0.0
    for row, start, stop in ((0, 0, 4), (0, 4, 8 if padded else 10), (1, 0, 7), (1, 7, 10)):
        own: list[torch.Tensor] = []
        model(x[row : row + 1, start:stop], None, Context(losses=own))
        alone += float(torch.stack(own).sum().detach()) * (stop - start)
    assert float(torch.stack(found).sum().detach()) == pytest.approx(alone / int(valid.sum()), rel=1e-10)
