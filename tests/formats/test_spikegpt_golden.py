"""Proof from outside: SpikeGPT's own training code, run on random weights, gives the logits we give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from spikelm.formats.spikegpt import read_spikegpt
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.state import flatten

FIXTURE = Path(__file__).parents[1] / "golden" / "spikegpt_random.safetensors"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    with safe_open(FIXTURE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.fixture(scope="module")
def model(recorded: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> SpikeLM:
    path = tmp_path_factory.mktemp("spikegpt") / "random.pth"
    torch.save({n.removeprefix("weight."): v for n, v in recorded.items() if n.startswith("weight.")}, path)
    return read_spikegpt(path, binary_embedding=True).model()


def test_forward(model: SpikeLM, recorded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        logits, _ = model(recorded["tokens"])
    torch.testing.assert_close(logits, recorded["logits"], atol=2e-5, rtol=0)


def test_step(model: SpikeLM, recorded: dict[str, Tensor]) -> None:
    tokens, state = recorded["tokens"], None
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            logits, state = model(tokens[:, t], state)
            torch.testing.assert_close(logits, recorded["logits"][:, t], atol=2e-5, rtol=0)


def test_packed_into_one_row(model: SpikeLM, recorded: dict[str, Tensor]) -> None:
    """Two documents one after another, with a reset between them, are the two rows of the reference."""
    tokens, expected = recorded["tokens"], recorded["logits"]
    reset = torch.zeros(1, tokens.numel(), dtype=torch.bool)
    reset[0, tokens.shape[1]] = True
    with torch.no_grad():
        logits, _ = model(tokens.reshape(1, -1), None, Context(reset=reset))
    torch.testing.assert_close(logits.view_as(expected), expected, atol=2e-5, rtol=0)


def test_neurons_fire_in_the_fixture(model: SpikeLM, recorded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        _, state = model(recorded["tokens"])
    membranes = {name: value for name, value in flatten(state).items() if name.endswith("membrane")}
    assert len(membranes) == 4
    for name, value in membranes.items():
        assert 0.01 < float((value == 0).float().mean()) < 0.9, name
    assert FIXTURE.stat().st_size < 300_000
