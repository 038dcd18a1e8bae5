"""Trackers: real event files, read back by TensorBoard; runs that are killed, rolled back, out of disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.errors import ConfigError
from spikelm.train import trackers
from spikelm.train.config import TrainConfig
from spikelm.train.log import RunLog
from spikelm.train.trackers import chosen, curves
from spikelm.train.trainer import Trainer

pytest.importorskip("tensorboard")

KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from spikelm.train.config import TrainConfig
from spikelm.train.trainer import Trainer
original = Trainer._train_step
def step(self, bar):
    original(self, bar)
    if self._state.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._train_step = step
Trainer(TrainConfig.from_dict(json.loads(sys.argv[1]))).run()
"""


class Recorder:
    """A progress bar that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def advance(self, amount: float = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def open(
        self, title: str, total: float | None = None, unit: str = "it", done: float = 0
    ) -> Iterator[Recorder]:
        yield self


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_as_logged(out: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves are those of the log, point by point."""
    shown = scalars(out / "tensorboard")
    log = RunLog(out / "log.jsonl")
    for tag, event, key in [
        ("train/loss", "step", "loss"),
        ("optim/grad_norm", "step", "grad_norm"),
        ("spikes/spike_rate", "step", "spike_rate"),
        ("held_out/bits_per_byte", "evaluation", "bits_per_byte"),
    ]:
        logged = [(line["step"], line[key]) for line in log.read(event)]
        assert [step for step, _ in shown[tag]] == [step for step, _ in logged], tag
        assert [v for _, v in shown[tag]] == pytest.approx([v for _, v in logged], rel=1e-6)
    return shown


def test_killed_run_goes_on_with_the_same_curves(make_values: Any, tmp_path: Path) -> None:
    """kill -9 at step 8, two log lines after the last checkpoint."""
    values = make_values(trackers="auto", log_every=1, sample_every=6, sample_tokens=3)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(values), "8"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert scalars(tmp_path / "run" / "tensorboard")["train/loss"][-1][0] == 8
    result = Trainer(TrainConfig.from_dict(values)).run()
    assert result.resumed_from == 6
    shown = assert_as_logged(tmp_path / "run")
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 13))
    for tag in ("speed/tokens_per_second", "memory/rss", "layer_00/silent", "layer_01/never_fired"):
        assert [step for step, _ in shown[tag]] == list(range(1, 13)), tag
    assert "projections/blocks.0.mixer.key" in shown
    # A run that begins anew in the same folder does not show the old one's points.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    Trainer(TrainConfig.from_dict({**values, "steps": 4, "schedule": {"warmup": 1}})).run()
    assert [step for step, _ in assert_as_logged(tmp_path / "run")["train/loss"]] == [1, 2, 3, 4]


def test_rollback_takes_points_back(make_values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(
        TrainConfig.from_dict(make_values(trackers=["tensorboard"], log_every=1, on_bad_step="rollback"))
    )
    loss, done = run._backend.loss, []

    def poisoned(inputs: Any, targets: Any, state: Any, ctx: Any, **options: Any) -> Any:
        output = loss(inputs, targets, state, ctx, **options)
        if ctx.step == 7 and ctx.meter is not None and not done:
            done.append(True)
            return dataclasses.replace(output, loss=output.loss * math.nan)
        return output

    monkeypatch.setattr(run._backend, "loss", poisoned)
    assert run.run().step == 12 and done
    shown = assert_as_logged(run.out)
    assert shown["events/bad_step"] == [(6, 1.0)]
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 13))


# TensorBoard's writing thread dies of it, which Python tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_failing_disk_ends_the_tracker_not_the_run(
    make_values: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bar = Recorder()
    run = Trainer(
        TrainConfig.from_dict(make_values(trackers=["tensorboard"], log_every=1)), progress=bar.open
    )
    original = Trainer._train_step

    def step(self: Trainer, bar: Any) -> None:
        original(self, bar)
        if self._state.step == 5:  # the folder goes away and something else is in its place
            shutil.rmtree(run.out / "tensorboard")
            (run.out / "tensorboard").write_text("full")

    monkeypatch.setattr(Trainer, "_train_step", step)
    assert run.run().step == 12
    said = [line for line in bar.lines if line.startswith("warning")]
    assert len(said) == 1 and "the tracker tensorboard failed and is off from here on" in said[0], said
    assert len(run.log.read("warning")) == 1
    # And from the start: the folder cannot even be made.
    values = make_values(trackers=["tensorboard"], steps=4, out=str(tmp_path / "second"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "tensorboard").write_text("a file")
    second = Trainer(TrainConfig.from_dict(values))
    assert second.run().step == 4 and len(second.log.read("warning")) == 1


def test_accelerate_forms_no_group_and_leaves_no_state(
    make_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process under a launcher, as with torchrun --nproc-per-node 1."""
    from accelerate.state import PartialState

    launcher = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for key, value in launcher.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    PartialState._reset_state()  # another test of this process may have left one, which would stay
    before, threads = dict(os.environ), torch.get_num_threads()
    Trainer(TrainConfig.from_dict(make_values(trackers="tensorboard", steps=2))).run()
    assert not torch.distributed.is_initialized() and torch.get_num_threads() == threads
    assert PartialState._shared_state == {} and dict(os.environ) == before


def test_names(make_values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(value: Any) -> Any:
        return TrainConfig.from_dict(make_values(trackers=value)).trackers

    assert wanted("auto") == "auto" and wanted([]) == [] and wanted("wandb") == ["wandb"]
    assert wanted(["tensorboard", "tensorboard"]) == ["tensorboard"]
    for value, words in [
        (["tensorbord"], "trackers: unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ("weights", "known: auto, tensorboard, trackio, wandb"),
        (3, "trackers: 3 is no list of names"),
        ([1], "no list of names"),
    ]:
        with pytest.raises(ConfigError) as caught:
            wanted(value)
        assert words in str(caught.value)
    assert chosen("auto") == (["tensorboard"], None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_missing_package(make_values: Any, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=f"run `pip install {name}`, or leave {name} out"):
        Trainer(TrainConfig.from_dict(make_values(trackers=name)))


def test_auto_without_tensorboard(make_values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_installed", lambda name: False)
    bar = Recorder()
    Trainer(TrainConfig.from_dict(make_values(trackers="auto", steps=2)), progress=bar.open).run()
    assert sum("pip install tensorboard" in line for line in bar.lines) == 1
    assert not any(line.startswith("warning") for line in bar.lines)


def test_curves() -> None:
    line = {
        "step": 3,
        "loss": 2.0,
        "bits_per_byte": math.nan,
        "mfu": None,
        "memory": {"rss": 5},
        "layers": {"1": {"firing_rate": 0.5, "silent": 0.5}},
        "projections": {"blocks.1.mixer.key": {"firing_rate": 0.25, "silent": 0.75}},
    }
    assert curves("step", line) == {
        "train/loss": 2.0,
        "memory/rss": 5,
        "layer_01/firing_rate": 0.5,
        "layer_01/silent": 0.5,
        "projections/blocks.1.mixer.key": 0.25,
    }
    assert curves("warning", {"step": 3, "text": "x"}) == {}


# --- trackers that cannot take points back ------------------------------------------------------------------


def interrupted(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that loses its last two steps and goes on."""

    class Stopped(Exception):
        pass

    original = Trainer._train_step

    def step(self: Trainer, bar: Any) -> None:
        original(self, bar)
        if self._state.step == 8:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        with pytest.raises(Stopped):
            Trainer(TrainConfig.from_dict(values)).run()
    assert Trainer(TrainConfig.from_dict(values)).run().resumed_from == 6


def test_trackio(make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    project = f"spikelm-test-{os.getpid()}"
    monkeypatch.setenv("TRACKIO_PROJECT", project)
    interrupted(make_values(trackers="trackio", log_every=1), monkeypatch)
    (run,) = SQLiteStorage.get_runs(project)
    assert run.startswith("run-")
    lines = SQLiteStorage.get_logs(project, run)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))


def test_wandb_offline(make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted(make_values(trackers="wandb", log_every=1), monkeypatch)
    record = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    runs = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{record['id']}"))
    assert len(runs) == 2 and record["step"] == 12  # two processes, one run
    assert not RunLog(tmp_path / "run" / "log.jsonl").read("warning")
