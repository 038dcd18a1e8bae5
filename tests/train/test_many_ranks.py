"""Checkpoints of two real ranks: shared writing, failures told by both, files of one rank damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spikelm.checkpoint import load_model
from spikelm.errors import CheckpointError
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.config import TrainConfig
from spikelm.train.log import RunLog
from spikelm.train.trainer import Trainer

from .conftest import tiny
from .workers import run_jobs

STEADY = {"schedule__name": "constant", "log_every": 1}


def lines(out: str | Path, event: str) -> list[dict[str, Any]]:
    return RunLog(Path(out) / "log.jsonl").read(event)


def losses(out: str | Path) -> list[float]:
    return [line["loss"] for line in lines(out, "step")]


# --- one launch: what two ranks write, and what happens when one of them fails ------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks did, in one launch: name -> (folder of the run, what the ranks told)."""
    folder = tmp_path_factory.mktemp("two")
    make = tiny(folder)

    def job(name: str, fault: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        values = make(**{"out": str(folder / name), **STEADY, **changes})
        return {"values": values, "faults": [] if fault is None else [fault]}

    size = 3000
    bad = {"rank": 1, "samples": [26]}  # of step 7: rank 1 has the samples 26 and 27 of 24 to 27
    jobs = {
        "whole": job("whole"),
        "again": job("whole"),
        "disk": job("disk", {"kind": "disk", "rank": 1, "bytes": size}),
        "disk0": job("disk0", {"kind": "disk", "rank": 0, "bytes": 20000}, async_checkpoints=False),
        "mended": job("disk"),
        "signal": job("signal", {"kind": "signal", "rank": 1, "step": 5, "name": "SIGUSR1"}),
        "goes on": job("signal"),
        "stop loss": job("stop loss", {"kind": "loss", **bad}, accumulation=2),
        "skip loss": job("skip loss", {"kind": "loss", **bad}, on_bad_step="skip"),
        "skip gradient": job("skip gradient", {"kind": "gradient", **bad}, on_bad_step="skip"),
        "back gradient": job("back gradient", {"kind": "gradient", **bad}, on_bad_step="rollback"),
        "unwritable": job("x", out="/proc/nowhere/run"),
    }
    told = run_jobs(2, list(jobs.values()), folder / "launch")
    return {
        name: (Path(entry["values"]["out"]), seen)
        for (name, entry), seen in zip(jobs.items(), told, strict=True)
    }


def test_each_rank_writes_its_share(two: dict[str, Any]) -> None:
    out, told = two["whole"]
    assert [seen["step"] for seen in told] == [12, 12]
    folder = out / "latest"
    names = {f"training-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {path.name for path in folder.glob("training*.safetensors")} == names
    parts = [load_file(folder / name) for name in sorted(names)]
    weights = load_file(folder / "model.safetensors")
    memory = [{key for key in part if key.startswith("optimizer/")} for part in parts]
    assert not memory[0] & memory[1]
    assert len(memory[0] | memory[1]) == 3 * len(weights)
    nbytes = [sum(v.numel() * v.element_size() for v in part.values()) for part in (*parts, weights)]
    largest = max(v.numel() * v.element_size() for part in parts for v in part.values())
    assert abs(nbytes[0] + nbytes[2] - nbytes[1]) <= largest + 5056  # balanced; a random state has 5056 bytes
    assert [[key for key in part if key.startswith("random/")] for part in parts] == [
        ["random/00000/cpu"],
        ["random/00001/cpu"],
    ]
    assert load_model(folder).config.hidden_size == 16
    record = json.loads((folder / "training.json").read_text())
    assert names <= set(record["files"])
    event = lines(out, "checkpoint")[-1]
    assert event["step"] == 12 and event["files"] == len(record["files"])
    assert event["bytes"] == sum(entry["bytes"] for entry in record["files"].values())
    assert event["blocked_seconds"] >= event["waited_seconds"] >= 0 < event["written_seconds"]


def test_a_finished_run_of_two_ranks_is_left_alone(two: dict[str, Any]) -> None:
    assert [(seen["step"], seen["resumed"]) for seen in two["again"][1]] == [(12, 12), (12, 12)]


def test_a_full_disk_on_one_rank_fails_the_save_on_all(two: dict[str, Any]) -> None:
    out, told = two["disk"]
    errors = [seen["error"] for seen in told]
    assert errors[0] == errors[1] and "\n" not in errors[0]
    for word in (
        "CheckpointError",
        "the checkpoint of step 3 cannot",
        "rank 1: File too large",
        "no earlier",
    ):
        assert word in errors[0]
    assert not list((out / "checkpoints").glob("*3")) and two["mended"][1][0]["step"] == 12


def test_a_full_disk_on_rank_0_too(two: dict[str, Any]) -> None:
    errors = [seen["error"] for seen in two["disk0"][1]]
    assert errors[0] == errors[1]
    assert "File too large" in errors[0] or "cannot be written" in errors[0]


def test_an_unwritable_folder_is_told_by_all(two: dict[str, Any]) -> None:
    errors = [seen["error"] for seen in two["unwritable"][1]]
    assert errors[0] == errors[1] and "cannot be written" in errors[0]


def test_a_signal_at_one_rank_stops_all_with_a_checkpoint(two: dict[str, Any]) -> None:
    out, told = two["signal"]
    assert [(seen["step"], seen["interrupted"]) for seen in told] == [(5, "SIGUSR1")] * 2
    assert [seen["resumed"] for seen in two["goes on"][1]] == [5, 5]
    assert losses(out) == losses(two["whole"][0])


def test_a_bad_loss_on_one_rank_stops_all(two: dict[str, Any]) -> None:
    out, told = two["stop loss"]
    assert told[0]["error"] == told[1]["error"]
    words = "the loss is nan in step 7 on rank 1, micro-batch 1 of 2, samples 26 to 26: stopped before"
    assert words in told[0]["error"] and "step-00000006 is intact" in told[0]["error"]
    (event,) = lines(out, "stopped")
    assert (event["rank"], event["micro_batch"], event["samples"]) == (1, 0, [26, 26])


@pytest.mark.parametrize("name", ["skip loss", "skip gradient", "back gradient"])
def test_a_bad_batch_on_one_rank_is_passed_over(two: dict[str, Any], name: str) -> None:
    out, told = two[name]
    assert [seen["step"] for seen in told] == [12, 12]
    (event,) = lines(out, "bad_step")
    assert (event["at"], event["rank"], event["micro_batch"]) == (7, 1, 0)
    assert event["samples"] == [26, 27] and event["batch"] == [24, 27]
    assert bool(event["parameters"]) == name.endswith("gradient")
    progress = json.loads((out / "latest" / "training.json").read_text())["progress"]
    assert progress["avoid"] == [24] and progress["samples"] == 13 * 4
    whole = losses(two["whole"][0])
    # Step 7 has the samples that were step 8's, from the same weights: not what it was, yet nearby.
    assert losses(out)[:6] == whole[:6] and losses(out)[6] != whole[6]
    assert losses(out) == losses(two["skip loss"][0])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, 10),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_one_rank(two: dict[str, Any], tmp_path: Path, damage: str) -> None:
    """One process reads what two wrote; the checkpoint before is used, with a warning that names the file."""
    out = Path(shutil.copytree(two["whole"][0], tmp_path / "run", symlinks=True))
    name = "training-00002-of-00002.safetensors"
    DAMAGES[damage](out / "checkpoints" / "step-00000012" / name)
    values = json.loads((out / "latest" / "training.json").read_text())["config"]
    trainer = Trainer(TrainConfig.from_dict({**values, "out": str(out)}))
    assert trainer.run().resumed_from == 9
    (warning,) = trainer.log.read("warning")
    assert "checkpoint of step 12 is unusable" in warning["text"] and name in warning["text"]
    DAMAGES[damage](out / "checkpoints" / "step-00000009" / name)
    for step in CheckpointStore(out, 1).steps():
        (out / "checkpoints" / f"step-{step:08d}" / "config.json").write_text("x")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        trainer.run()
