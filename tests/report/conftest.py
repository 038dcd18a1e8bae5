"""Real records of two tiny models, and records of every other kind in their layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.config import ModelConfig
from spikelm.data.source import open_source
from spikelm.evaluation.corpus import read_corpus
from spikelm.evaluation.perplexity import Windows, measure
from spikelm.evaluation.record import stamp
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

TEXT = "Spikes are rare; silence is cheap. " * 36
HOSTILE = '<script>alert("x")</script> $x^$ | a_b*c* `q` & é'
"""A name that would break pages, pictures and tables if it were taken for anything but text."""

NEURONS = {
    "spiking": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0},
    "twin": {"name": "none"},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a spiking and of a dense model with the same weights."""
    root, found = tmp_path_factory.mktemp("report"), {}
    for name, neuron in NEURONS.items():
        torch.manual_seed(0)
        config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2, neuron=neuron)
        found[name] = save_checkpoint(root / name, SpikeLM(config), Tokenizer.bytes())
    return found


@pytest.fixture(scope="session")
def measured(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A record of both models on a text, measured here."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    corpus = read_corpus(open_source(path), Tokenizer.bytes())
    models = {}
    for label, folder in folders.items():
        model = load_model(folder)
        windows = Windows(modes=("disjoint", "carried"), length=64, stride=32)
        models[label] = measure(model, corpus, windows, vocab_size=256).to_dict() | {
            "parameters": model.num_parameters(),
            "by_position": [
                {
                    "from": 2**i,
                    "to": 2 ** (i + 1) - 1,
                    "tokens": 2**i,
                    "nats_per_token": 5.5 - i / 10,
                    "stderr": 0.1,
                }
                for i in range(8)
            ],
        }
    comparison = {
        "a": "spiking",
        "b": "twin",
        "figure": "carried",
        "difference_bits_per_byte": -0.02,
        "low": -0.03,
        "high": -0.01,
        "level": 0.95,
        "n": 9,
    }
    return stamp(
        "eval",
        {"models": models, "comparisons": [comparison]},
        arguments={"checkpoints": [str(folder) for folder in folders.values()], "data": str(path)},
        checkpoints=folders,
        data={"source": str(path), "name": "text.txt", "sha256": corpus.sha256, "bytes": corpus.bytes},
        tokenizer_sha256=Tokenizer.bytes().sha256,
        seed=3,
        n=9,
    )


def ledger(folders: dict[str, Path]) -> dict[str, Any]:
    """A record of costs, in the layout of docs/energy.md."""

    def model(macs: float, size: float, seconds: float | None) -> dict[str, Any]:
        batch = {"residency": "nothing", "dram_per_token": size, "dense_dram_per_token": 2 * size}
        total = {
            "dense_macs": 90000.0,
            "effective_macs": macs,
            "macs_without_spikes": 10.0,
            "accumulates": 77.0,
        }
        prices = {
            "compute": {
                "dense": 4.0e5,
                "effective": 1.0e5,
                "spikes": {"unary": 5.0e4, "ternary": None},
                "quantised_int8": 4.0,
            },
            "total": {"batch_1": {"dense": {"low": 1.0e6, "high": 2.0e6}, "spikes": {"unary": None}}},
        }
        return {
            "parameters": 1000,
            "operations": {"total": total | {"spiking_share": 0.9, "silent": 0.7}},
            "bytes": {"rule": {"sentence": "x"}, "batch_1": batch | {"on_chip_per_token": 3.0}},
            "energy": {"horowitz-45nm": prices},
            "measured": {
                "seconds_per_token": seconds,
                "joules_per_token": None,
                "counter": "no counter here",
            },
            "verdict": [f"It reads {size:.0f} bytes."],
        }

    models = {"spiking": model(30000.0, 4000.0, 0.5), "twin": model(80000.0, 9000.0, None)}
    return stamp(
        "energy",
        {"models": models},
        arguments={},
        checkpoints=folders,
        data=None,
        tokenizer_sha256=None,
        seed=0,
        n=None,
    )


def task_scores(folders: dict[str, Path]) -> dict[str, Any]:
    models = {
        "spiking": {"piqa": {"acc": 0.5, "acc_stderr": 0.02, "n": 40}},
        "twin": {"piqa": {"acc": 0.625, "n": 40}, "arc": {"acc": 0.25, "alias": "arc", "n": 8}},
    }
    return stamp(
        "tasks",
        {"models": models},
        arguments={},
        checkpoints=folders,
        data=None,
        tokenizer_sha256=None,
        seed=0,
        n=None,
    )


def retrieval(folders: dict[str, Path]) -> dict[str, Any]:
    rows = [
        {"length": length, "depth": depth, "accuracy": accuracy, "stderr": 0.05, "n": 20}
        for length, depth, accuracy in ((128, 0.0, 1.0), (128, 0.5, 0.5), (256, 0.0, 0.25))
    ]
    models = {"spiking": {"passkey": rows}, "twin": {"passkey": rows[:1]}}
    return stamp(
        "long-context",
        {"models": models},
        arguments={},
        checkpoints=folders,
        data=None,
        tokenizer_sha256=None,
        seed=0,
        n=None,
    )


@pytest.fixture
def record(measured: dict[str, Any]) -> dict[str, Any]:
    """A copy of the measured record, to change."""
    return copy.deepcopy(measured)


@pytest.fixture
def everything(record: dict[str, Any], folders: dict[str, Path]) -> list[dict[str, Any]]:
    """A record of every kind, of the same two models."""
    record["results"]["lengths"] = {
        label: {
            "window": 64,
            "state_bytes": 512,
            "points": [
                {
                    "tokens": n,
                    "nats_per_token": 5.0,
                    "perplexity_per_token": 148.4,
                    "bits_per_byte": 7.2,
                    "stderr": 0.1,
                    "last_half": {"gain": 0.125, "gain_stderr": 0.0625},
                }
                for n in (64, 128)
            ],
        }
        for label in folders
    }
    return [record, ledger(folders), task_scores(folders), retrieval(folders)]


@pytest.fixture
def renamed(record: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """The measured record with another label for its first model."""

    def rename(label: str) -> dict[str, Any]:
        for place in (record["results"]["models"], record["checkpoints"]):
            place[label] = place.pop("spiking")
        record["results"]["comparisons"][0]["a"] = label
        return record

    return rename
