"""A run so small that a step takes milliseconds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .finetuning import write_toy

MakeValues = Callable[..., dict[str, Any]]

WORDS = "the spike of a neuron is a small thing, and many of them say what one cannot".split()


def nest(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set dotted keys."""
    for key, value in changes.items():
        *path, last = key.split(".")
        node = values
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value


def tiny(folder: Path) -> MakeValues:
    """Maker of the values of a tiny run in ``folder``; keywords set keys (``__`` stands for the dot)."""
    for name, factor in (("train", 7), ("valid", 11)):
        text = " ".join(WORDS[(factor * i * i + i) % len(WORDS)] for i in range(1200))
        (folder / f"{name}.txt").write_text(text)

    def make(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "dropout": 0.1,
                "neuron": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0, "rate_target": {"target": 0.2}},
            },
            "data": {
                "train": str(folder / "train.txt"),
                "valid": str(folder / "valid.txt"),
                "block_length": 16,
                "cache": str(folder / "cache"),
            },
            "optim": {"lr": 3e-3},
            "schedule": {"warmup": 2},
            "steps": 12,
            "batch_size": 4,
            "eval_every": 4,
            "eval_batches": 2,
            "checkpoint_every": 3,
            "log_every": 2,
            "device": "cpu",
            "trackers": [],
            "measure_mfu": False,
            "out": str(folder / "run"),
        }
        nest(values, {key.replace("__", "."): value for key, value in changes.items()})
        return values

    return make


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written survives the death of a process; only a power cut needs fsync, and it takes time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def make_values(tmp_path: Path) -> MakeValues:
    """Values of a tiny run in tmp_path."""
    return tiny(tmp_path)


@pytest.fixture(scope="session")
def tiny_maker() -> Callable[[Path], MakeValues]:
    """:func:`tiny`, for fixtures of a wider scope."""
    return tiny


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny run that was never interrupted."""
    from spikelm.train.config import TrainConfig
    from spikelm.train.trainer import Trainer

    folder = tmp_path_factory.mktemp("finished")
    Trainer(TrainConfig.from_dict(tiny(folder)())).run()
    return folder / "run"


@pytest.fixture
def whole(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of that run in tmp_path."""
    return Path(shutil.copytree(finished_run, tmp_path / "whole", symlinks=True))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with a toy classification set."""
    write_toy(tmp_path / "train.txt", 320, 1)
    write_toy(tmp_path / "test.txt", 120, 2)
    return tmp_path
