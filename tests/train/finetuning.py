"""A toy classification set, and runs on it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import spikelm.hf  # noqa: F401 (makes the Auto classes know the model)
from spikelm.train.finetune.config import FinetuneConfig
from spikelm.train.finetune.seeds import Report, finetune

FILLER = "the film that he and she saw with them in this old house near a small town by our lake".split()
NEURONS = {
    "sd": {"placement": "before", "neuron": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0}},
    "lif": {"placement": "after", "neuron": {"name": "lif"}, "embedding_neuron": {"name": "heaviside"}},
    "twin": {"placement": "before", "neuron": {"name": "none"}},
}


def write_toy(path: Path, lines: int, seed: int, shuffled: bool = False) -> Path:
    """Lines whose class one word decides, wherever it stands."""
    rng = random.Random(seed)
    rows = []
    for number in range(lines):
        label = number % 2
        words = rng.choices(FILLER, k=rng.randint(3, 9))
        words.insert(
            rng.randrange(len(words) + 1), rng.choice((("awful", "dull"), ("lovely", "great"))[label])
        )
        rows.append((rng.randrange(2) if shuffled else label, " ".join(words)))
    path.write_text("".join(f"{label} {text}\n" for label, text in rows))
    return path


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tiny fine-tuning in a folder; ``data__fold`` stands for the key fold of data."""
    made: dict[str, Any] = {
        "model": {"hidden_size": 32, "num_hidden_layers": 1, **NEURONS["sd"]},
        "data": {
            "train": str(folder / "train.txt"),
            "test": str(folder / "test.txt"),
            "tokenizer": "bpe:320",
            "max_length": 64,
        },
        "optim": {"lr": 1e-2, "min_lr": 1e-3},
        "schedule": {"name": "cosine", "warmup": 4},
        "epochs": 4,
        "patience": 0,
        "batch_size": 16,
        "device": "cpu",
        "out": str(folder / "out"),
    }
    for key, value in changes.items():
        node, *rest = key.split("__")
        if rest:
            made[node] = {**made[node], rest[0]: value}
        else:
            made[node] = value
    return made


def run(folder: Path, **changes: Any) -> Report:
    return finetune(FinetuneConfig.from_dict(values(folder, **changes)))
