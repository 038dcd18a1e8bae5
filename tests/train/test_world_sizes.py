"""A run goes on with another number of ranks, another backend, another accumulation, by the same command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.train.config import TrainConfig
from spikelm.train.log import RunLog
from spikelm.train.trainer import Trainer

from .conftest import tiny
from .workers import run_jobs

TWIN = {"model__neuron": {"name": "none"}, "model__dropout": 0.0}
STEADY = {"schedule__name": "constant", "log_every": 1}


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in RunLog(out / "log.jsonl").read("step")]


def train(values: dict[str, Any]) -> Any:
    return Trainer(TrainConfig.from_dict(values)).run()


Leg = tuple[dict[str, Any], int]


def zero(stage: int) -> dict[str, Any]:
    """Settings of DeepSpeed's ZeRO."""
    return {"backend": "deepspeed", "deepspeed": f"zero{stage}"}


CHAINS: dict[str, list[Leg]] = {
    "one, two, one": [({}, 1), ({}, 2), ({}, 1)],
    "two, one, two": [({}, 2), ({"accumulation": 2}, 1), ({"accumulation": 2}, 2)],
    "accumulation": [({"accumulation": 2}, 1), ({"accumulation": 4}, 1), ({}, 2)],
    "ZeRO 1, ZeRO 3, ZeRO 2": [(zero(1), 2), (zero(3), 2), (zero(2), 2)],
    "ZeRO 3, one, ZeRO 1": [(zero(3), 2), ({}, 1), (zero(1), 2)],
    "two, ZeRO 2, one": [({}, 2), (zero(2), 2), ({}, 1)],
}
"""Name -> (settings, world size) of each third of a run. Chains share a launch for each third."""


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folder and resumed steps of each chain, and the run that was never interrupted."""
    folder = tmp_path_factory.mktemp("chains")
    make = tiny(folder)

    def values(name: str, **changes: Any) -> dict[str, Any]:
        return make(**{"out": str(folder / name), **STEADY, **TWIN, **changes})

    train(values("whole"))
    found: dict[str, Any] = {name: [] for name in CHAINS}
    for third in range(3):
        jobs = {
            name: {"values": {**values(name, steps=4 * (third + 1)), **legs[third][0]}}
            for name, legs in CHAINS.items()
        }
        for world_size in (1, 2):
            mine = [name for name in jobs if CHAINS[name][third][1] == world_size]
            if not mine:
                continue
            if world_size == 1:
                told = [[{"resumed": train(jobs[name]["values"]).resumed_from}] for name in mine]
            else:
                told = run_jobs(world_size, [jobs[name] for name in mine], folder / f"launch-{third}")
            for name, seen in zip(mine, told, strict=True):
                found[name].append(seen[0]["resumed"])
    return {"folder": folder, "resumed": found}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_with_another_number_of_ranks(chained: dict[str, Any], chain: str) -> None:
    folder = chained["folder"]
    assert chained["resumed"][chain] == [None, 4, 8]
    assert losses(folder / chain) == pytest.approx(losses(folder / "whole"), rel=1e-5)
    assert len(losses(folder / chain)) == 12
    ends = [
        json.loads((folder / name / "latest" / "training.json").read_text())["progress"]
        for name in (chain, "whole")
    ]
    for key in ("step", "samples", "tokens", "avoid", "evaluated", "count"):
        assert ends[0][key] == ends[1][key], key
    a, b = (load_model(folder / name).state_dict() for name in (chain, "whole"))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-5, msg=name)
