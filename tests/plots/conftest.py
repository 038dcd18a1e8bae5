"""Tiny real checkpoints, one for each kind of neuron, and a text they read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

TEXT = "Spikes are rare; silence is cheap. Costs $5 and $6, <b>bold</b>\n\t\x07é. " * 3

NEURONS: dict[str, dict[str, Any]] = {
    "adaptive": {"neuron": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0, "cap": 6}},
    "lif": {"neuron": {"name": "lif", "threshold": 0.3}},
    "soft": {"neuron": {"name": "lif", "threshold": 0.3, "reset": "soft", "gain": 2.0, "decay_input": False}},
    "after": {"neuron": {"name": "plif", "threshold": 0.2}, "placement": "after"},
    "dense": {"neuron": {"name": "none"}},
}


def make(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=3, **NEURONS[name])
    return save_checkpoint(folder / name, SpikeLM(config), Tokenizer.bytes())


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the checkpoint with a kind of neuron."""
    root = tmp_path_factory.mktemp("plots")
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = make(root, name)
        return made[name]

    return of


@pytest.fixture
def renamed(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """A copy of a checkpoint under another name."""
    return lambda name, other: Path(shutil.copytree(checkpoints(name), tmp_path / other))
