"""The SpikingBrain presets: their sizes, their memory, and the nano ones whole: contract and training."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from spikelm import presets
from spikelm.channels.moe import MoE
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.inspection import LENGTHS, inspect_model
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.state import flatten, state_bytes

NANO = ("spikingbrain-nano", "spikingbrain-nano-twin", "spikingbrain-moe-nano", "spikingbrain2-nano")


@cache
def described(name: str) -> SpikeLM:
    """A preset on the meta device: shapes without memory."""
    with torch.device("meta"):
        return SpikeLM(ModelConfig.from_yaml(name))


def active(model: SpikeLM) -> int:
    """Parameters that compute a token: all but the experts that are not chosen."""
    idle = 0
    for module in model.modules():
        if isinstance(module, MoE):
            one = sum(p.numel() for p in module.experts[0].parameters())
            idle += (len(module.experts) - module.top_k) * one
    return model.num_parameters() - idle


def test_the_7b_has_its_published_parameters() -> None:
    assert described("spikingbrain-7b").num_parameters() == 7_616_542_976


def test_the_76b_and_its_12b() -> None:
    model = described("spikingbrain-76b-a12b")
    total, used = model.num_parameters(), active(model)
    print(f"spikingbrain-76b-a12b: {total:,} parameters, {used:,} active")
    assert round(total / 1e9) in (76, 77)
    assert round(used / 1e9) in (12, 13)
    layers = [model.config.layer(i) for i in range(28)]
    full = [i + 1 for i, a in enumerate(layers) if a["mixer"]["branches"][1]["name"] == "attention"]
    dense = [i + 1 for i, a in enumerate(layers) if a["channel"]["name"] == "swiglu"]
    assert full == [7, 14, 21, 28]
    assert dense == [1, 2, 3, 5, 7, 9, 11]
    assert model.config.sink_tokens == 128


def test_other_sizes() -> None:
    assert round(described("spikingbrain-1b").num_parameters() / 1e9, 1) == 1.2
    model = described("spikingbrain2-5b-like")
    assert round(model.num_parameters() / 1e9) == 5
    softmax = [i for i in range(36) if model.config.layer(i)["mixer"]["name"] == "attention"]
    assert softmax == [0, 1, 2, 3, 6, 12, 17, 21, 24, 35]
    for name in NANO:
        assert 1.8e6 < described(name).num_parameters() < 2.2e6, name


def test_the_twin_is_the_model_without_neurons() -> None:
    spiking = ModelConfig.from_yaml("spikingbrain-nano")
    assert ModelConfig.from_yaml("spikingbrain-nano-twin") == spiking.twin()


@pytest.mark.parametrize("name", presets.names("models"))
def test_memory_of_a_sequence(name: str) -> None:
    """Constant for every preset without full attention; linear and told for the others."""
    model = described(name)
    sizes = [state_bytes(model.empty_state(1, max_len=length)) for length in LENGTHS]
    has_full = '"attention"' in str(model.config.to_dict()).replace("'", '"')
    assert model.grows == has_full
    inspection = inspect_model(name)
    assert list(inspection.state_bytes_at.values()) == sizes
    assert (inspection.growth_bytes > 0) == has_full
    if has_full:
        assert sizes[1] - sizes[0] == (LENGTHS[1] - LENGTHS[0]) * inspection.growth_bytes
        assert sizes[2] - sizes[1] == (LENGTHS[2] - LENGTHS[1]) * inspection.growth_bytes
    else:
        assert len(set(sizes)) == 1
        assert sizes[0] == inspection.state_bytes


def test_inspect_tells_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "spikingbrain-nano"]) == 0
    assert "the same after every token" in capsys.readouterr().out
    assert main(["inspect", "spikingbrain-moe-nano"]) == 0
    out = capsys.readouterr().out
    assert "more for every token" in out
    assert "Memory grows with the text" in out
    assert "at 1,000,000 tokens" in out


@pytest.fixture
def nano() -> Callable[[str], SpikeLM]:
    """A nano preset in float64 with weights large enough that every part matters."""

    def build(name: str) -> SpikeLM:
        model = SpikeLM(ModelConfig.from_yaml(name)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.add_(torch.randn_like(parameter) * 0.7 * parameter.shape[1] ** -0.5)
        return model

    return build


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NANO)
def test_contract_of_the_whole_model(name: str, nano: Callable[[str], SpikeLM]) -> None:
    """Token by token, in chunks, packed, padded: always the logits of the text alone; past every window."""
    model = nano(name)
    T = 70 if name != "spikingbrain-nano" else 140
    tokens = torch.randint(0, 256, (2, T))
    with torch.no_grad():
        whole, final = model(tokens, model.init_state(2, max_len=2 * T))
        state = model.init_state(2, max_len=2 * T)
        described_state = flatten(model.empty_state(2, max_len=2 * T))  # what memory is measured on
        assert {p: v.shape for p, v in described_state.items()} == {
            p: v.shape for p, v in flatten(state).items()
        }
        for t in range(T):
            logits, state = model(tokens[:, t], state)
            close(logits, whole[:, t])
        for path, value in flatten(final).items():
            close(flatten(state)[path].double(), value.double())
        first, state = model(tokens[:, :33], model.init_state(2, max_len=2 * T))
        rest, _ = model(tokens[:, 33:], state)
        close(torch.cat([first, rest], 1), whole)
        packed = tokens.reshape(1, -1)
        reset = torch.zeros_like(packed, dtype=torch.bool)
        reset[0, [0, T]] = True
        logits, _ = model(packed, None, Context(reset=reset))
        close(logits.view_as(whole), whole)
        valid = torch.ones(2, T + 9, dtype=torch.bool)
        valid[0, :9] = valid[1, 20:29] = False
        padded = torch.full((2, T + 9), 7)
        padded[valid] = tokens.flatten()
        logits, state = model(padded, None, Context(valid=valid))
        close(logits[valid].view_as(whole), whole)
        more, _ = model(tokens[:, :1], model.reserve(state, 2 * T))
        expected, _ = model(tokens[:, :1], final)
        close(more, expected)


def test_a_long_text_in_chunks(nano: Callable[[str], SpikeLM]) -> None:
    """Some thousand tokens, far beyond the window: the state keeps its shapes and stays finite."""
    model = nano("spikingbrain-nano").float()
    state = model.init_state(1)
    shapes = {path: value.shape for path, value in flatten(state).items()}
    text = torch.randint(0, 256, (1, 6000))
    with torch.no_grad():
        for chunk in text.split(750, 1):
            logits, state = model(chunk, state, last_only=True)
            assert {path: value.shape for path, value in flatten(state).items()} == shapes
            assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", NANO)
def test_training_lowers_the_loss(name: str) -> None:
    """A few steps on a text that repeats: from the loss of a guess to less than half of it."""
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(name)).train()
    text = torch.tensor(list(b"the spikes that a neuron sends are counted, not weighed; " * 3))
    tokens = torch.stack([text[i : i + 64] for i in (0, 23)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        extra: list[Tensor] = []
        logits, _ = model(tokens, None, Context(losses=extra))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        (loss + sum(extra, torch.zeros(()))).backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert 5.0 < losses[0] < 6.2
    assert losses[-1] < 0.5 * losses[0], losses
