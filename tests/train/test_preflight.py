"""Ranks that differ are found before they train together; the disk is looked at; the report is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from spikelm.cli import main
from spikelm.errors import ConfigError, TrainingError
from spikelm.train import preflight as module
from spikelm.train.config import TrainConfig
from spikelm.train.launch import free_port
from spikelm.train.preflight import compare, disk_room
from spikelm.train.trainer import Trainer


def test_two_ranks_with_another_configuration_are_named(make_values: Any, tmp_path: Path) -> None:
    """Two real ranks, started by hand as two machines with different files would be.

    Their models have other shapes, so this must be told before anything is built together.
    """
    port, processes = free_port(), []
    for rank, size in enumerate((16, 32)):
        config = tmp_path / f"rank{rank}.yaml"
        config.write_text(yaml.safe_dump(make_values(model__hidden_size=size)))
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "spikelm.train", str(config)],
                env={**os.environ, **{name: str(value) for name, value in places.items()}},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    lines = [line for text in errors for line in text.splitlines() if line.startswith("rank ")]
    sentence = (
        "configuration key model.hidden_size is 16 on rank 0 and 32 on rank 1; "
        "give every machine the same environment, configuration and files"
    )
    # One of them says it; whether rank 0 has something to add depends on who was first.
    assert sum(line.endswith(f": {sentence}") and "ended because" not in line for line in lines) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"the version of torch": "2.12.0"}, "the version of torch is 2.13.0 on rank 0 and 2.12.0 on rank 2"),
        ({"data.train (fingerprint)": "ff"}, "data.train (fingerprint) is aa on rank 0 and ff on rank 2"),
        ({"configuration key steps": 9}, "configuration key steps is 8 on rank 0 and 9 on rank 2"),
        ({"the version of deepspeed": "1"}, "the version of deepspeed is absent on rank 0 and 1 on rank 2"),
    ],
)
def test_what_differs_is_told(other: dict[str, Any], said: str) -> None:
    same = {"the version of torch": "2.13.0", "data.train (fingerprint)": "aa", "configuration key steps": 8}
    compare([same, dict(same), dict(same)])
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        compare([same, dict(same), {**same, **other}])


def test_report_of_one_process(make_values: Any, tmp_path: Path) -> None:
    trainer = Trainer(TrainConfig.from_dict(make_values(steps=1, schedule__warmup=0, eval_every=0)))
    trainer.run()
    (told,) = trainer.log.read("preflight")
    assert told["world_size"] == 1 and told["all_reduce"] is None and told["clock_skew"] is None
    assert (
        told["versions"]["torch"].startswith("2.") and told["threads"] == [1] and told["devices"] == ["cpu"]
    )
    # Two checkpoints are kept and a third is written beside them.
    assert told["disk_needed"] == 3 * 12 * trainer.model.num_parameters()
    line = trainer.preflight.line()
    assert (
        line.startswith("preflight: 1 rank on 1 machine (cpu, 1 thread each), disk ")
        and "all-reduce" not in line
    )


def test_no_room_for_the_checkpoints(
    make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(TrainingError, match=r"has 0\.00 GiB free, and keep=2 checkpoints .* out=FOLDER"):
        Trainer(TrainConfig.from_dict(make_values()))


def test_checkpoints_that_exist_need_no_more_room(tmp_path: Path) -> None:
    free, present = disk_room(tmp_path / "not" / "there")
    assert free is not None and free > 0 and present == 0
    assert disk_room(Path("/proc/nowhere")) == (None, 0)
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1234)
    assert disk_room(tmp_path / "run")[1] == 1234


def test_check_runs_only_the_preflight(make_values: Any, tmp_path: Path, capfd: Any) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_values()))
    assert main(["train", "--check", str(config)]) == 0
    assert capfd.readouterr().out.startswith("preflight: 1 rank on 1 machine")
    assert main(["train", "--check", str(config), "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["world_size"] == 1
    assert not (tmp_path / "run").exists()


def test_check_refuses_what_the_run_would_refuse(
    make_values: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_values(out=str(whole))))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(["train", "--check", str(config)]) == 0
    assert main(["train", "--check", str(config), "seed=5"]) == 2
    assert "holds another run: seed is 0 in the checkpoint and 5 now" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
