"""A small model trained here and text for it, shared by the tests of conversion."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

SENTENCES = [
    "A spike is an event; silence costs nothing. ",
    "The threshold follows the mean of the input, and counts are whole numbers. ",
    "What a kernel can skip are silent channels. ",
    "Bits of a count are sent one after another, each with its weight. ",
]


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(SENTENCES), (count,), generator=generator).tolist()
    return "".join(SENTENCES[pick] for pick in picks)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """``twin``: a checkpoint without neurons, trained for some seconds; ``text`` and ``other``: files."""
    folder = tmp_path_factory.mktemp("trained")
    text, other = folder / "text.txt", folder / "other.txt"
    text.write_text(words(150, 0))
    other.write_text(words(40, 1))
    torch.manual_seed(0)
    twin = ModelConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, neuron={"name": "none"})
    model = SpikeLM(twin)
    data = torch.tensor(list(text.read_bytes()))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        starts = torch.randint(0, len(data) - 65, (8,))
        batch = torch.stack([data[s : s + 65] for s in starts.tolist()])
        logits, _ = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 2.0  # far below log 256: there is something to lose
    save_checkpoint(folder / "twin", model, Tokenizer.bytes())
    return SimpleNamespace(folder=folder, twin=folder / "twin", text=text, other=other, model=model)


@pytest.fixture(scope="session")
def variants(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same weights under other neurons: ``adaptive``, ``mixed`` (binary here and there), ``after``."""
    folder = tmp_path_factory.mktemp("variants")
    config = trained.model.config
    made = {}
    for name, fields in {
        "adaptive": {"neuron": {"name": "adaptive", "k": 2.0, "dead_zone": 0.5}},
        "mixed": {"neuron_overrides": {"blocks.*.channel.key": {"name": "heaviside"}}},
        "after": {"placement": "after", "neuron": {"name": "lif"}},
        "tied": {"tie_word_embeddings": True},
    }.items():
        model = SpikeLM(dataclasses.replace(config, **fields))
        weights = trained.model.state_dict()
        model.load_state_dict(weights, strict=False)
        made[name] = save_checkpoint(folder / name, model, Tokenizer.bytes())
    return SimpleNamespace(**made)
