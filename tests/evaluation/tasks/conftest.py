"""Small models whose every part does something, and a folder of small tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

ADAPTIVE = {"name": "adaptive", "k": 3.0, "dead_zone": 0.7}
INT8 = {"name": "int8"}
WORDS = "the cat sat on a mat and some dogs ran over green hills while rain fell softly".split()


def small(kind: str, vocab_size: int = 256, **options: Any) -> SpikeLM:
    """A random model: ``twin`` (continuous), ``float`` (spikes, float weights) or ``int8`` (integer path)."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
        **options,
    }
    if kind == "int8":
        given |= {"neuron": ADAPTIVE, "head_neuron": ADAPTIVE, "weights": INT8}
        given["weight_overrides"] = {"head": INT8}
    config = ModelConfig(**given)
    return SpikeLM(config.twin() if kind == "twin" else config).eval()


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    rng = random.Random(0)
    return Tokenizer.train_bpe([sentence(rng, 400)], 300)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as SPIKELM_DATA names one, with the eight files of the offline tasks in small."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "eval").mkdir()
    rng = random.Random(1)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "eval" / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def question(choices: int, ending: str, start: str = "Question: ") -> dict[str, Any]:
        return {
            "query": start + sentence(rng, 12) + ending,
            "choices": [sentence(rng, rng.randint(2, 5)) for _ in range(choices)],
            "gold": rng.randrange(choices),
        }

    for name in ("arc_easy", "arc_challenge"):
        write(name, [question(4, "?") for _ in range(24)])
    write("piqa", [question(2, "?\n") for _ in range(24)])
    write("openbook_qa", [question(4, "", "") for _ in range(24)])
    write("copa", [question(2, ", therefore", "") for _ in range(24)])
    passages = [sentence(rng, 15) for _ in range(24)]
    write("lambada_test", [{"text": text} for text in passages])
    parts = [text.rpartition(" ") for text in passages]
    write("lambada_openai", [{"context": a, "continuation": b} for a, _, b in parts])
    schemas = []
    for number in range(24):
        start, end = sentence(rng, 6), sentence(rng, 3)
        options = [f"{start} the cat", f"{start} some dogs"]
        schemas.append({"context_options": options, "continuation": end, "gold": number % 2})
    write("winograd_wsc", schemas)
    return folder


@pytest.fixture
def offline_data(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPIKELM_DATA", str(data_folder))
    return data_folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    return save_checkpoint(folder, small("int8"), Tokenizer.bytes())
