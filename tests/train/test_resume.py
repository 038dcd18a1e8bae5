"""A run that was stopped anywhere and resumed is bit for bit the run that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spikelm.errors import CheckpointError, TrainingError
from spikelm.train.config import TrainConfig
from spikelm.train.log import RunLog
from spikelm.train.result import TrainResult
from spikelm.train.trainer import Trainer

TIMES = ("tokens_per_second", "seconds", "step_seconds", "data_seconds", "mfu", "memory", "time")


def run(values: dict[str, Any]) -> TrainResult:
    return Trainer(TrainConfig.from_dict(values)).run()


def figures(out: Path) -> list[dict[str, Any]]:
    """Every logged number but the times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    wanted = [line for line in lines if line["event"] in ("step", "evaluation")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in wanted]


def assert_same(a: Path, b: Path, step: int = 12) -> None:
    """Model, optimiser, random state, progress and log of two runs are equal, bit for bit."""
    for name in ("model.safetensors", "training.safetensors"):
        left, right = (load_file(out / "checkpoints" / f"step-{step:08d}" / name) for out in (a, b))
        assert left.keys() == right.keys() and left
        for key, value in left.items():
            assert torch.equal(value, right[key]), f"{name}: {key}"
    records = [
        json.loads((out / "checkpoints" / f"step-{step:08d}" / "training.json").read_text()) for out in (a, b)
    ]
    left, right = ({k: v for k, v in record["progress"].items() if k != "seconds"} for record in records)
    assert left == right
    assert figures(a) == figures(b)


class Killed(BaseException):
    """Stands for a kill: no handler of the program may see it."""


@pytest.mark.parametrize(
    ("optim", "at"), [("adamw", 1), ("adamw", 5), ("adamw", 8), ("adam", 7), ("muon", 5)]
)
def test_stopped_in_the_middle(
    make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, at: int
) -> None:
    """Also between two log lines and between two checkpoints."""
    whole = tmp_path / "whole"
    run(make_values(out=str(whole), optim__name=optim))
    original = Trainer._train_step

    def step(self: Trainer, bar: Any) -> None:
        original(self, bar)
        if self._state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_train_step", step)
    values = make_values(optim__name=optim)
    first = run(values)
    assert first.interrupted == "SIGTERM" and first.step == at
    monkeypatch.setattr(Trainer, "_train_step", original)
    torch.manual_seed(99)  # whatever the process did before must not matter
    torch.rand(7)
    second = run(values)
    assert second.resumed_from == at and second.step == 12 and second.interrupted is None
    assert_same(whole, tmp_path / "run")


def test_random_numbers_of_torch_go_on(make_values: Any, tmp_path: Path) -> None:
    """A part that draws from torch's global generator is resumed as well."""

    class Stopped(Exception):
        pass

    def noisy(values: dict[str, Any], stop: int) -> None:
        trainer = Trainer(TrainConfig.from_dict(values))

        def noise(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if trainer._state.step == stop:
                raise Stopped
            return output + 0.1 * torch.rand_like(output)

        trainer.model.embedding.register_forward_hook(noise)
        trainer.run()

    noisy(make_values(out=str(tmp_path / "whole")), stop=-1)
    with pytest.raises(Stopped):
        noisy(make_values(), stop=7)
    noisy(make_values(), stop=-1)
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("moment", [3, 9, 14, 20, 24])
def test_killed_while_a_checkpoint_is_written(
    make_values: Any, tmp_path: Path, whole: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few moments with a real run; tests/train/test_checkpoints.py has all of them."""
    original, count = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise Killed
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Killed):
            run(make_values())
    run(make_values())
    assert_same(whole, tmp_path / "run")


def test_kill_9_of_a_real_process(make_values: Any, tmp_path: Path) -> None:
    """SIGKILL at random moments while checkpoints are written at every step."""
    values = make_values(steps=30, checkpoint_every=1, eval_every=10, schedule__warmup=0)
    whole = tmp_path / "whole"
    run({**values, "out": str(whole)})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "spikelm", "train", str(config)]
    latest = tmp_path / "run" / "latest"
    chance = random.Random(int(time.time()))
    for _ in range(2):
        before = os.readlink(latest) if latest.is_symlink() else ""
        # fp32 sums depend on the number of threads, and the run this is compared with has one.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        # Until this process has saved something: on a busy machine that is long after its log begins.
        while process.poll() is None and (not latest.is_symlink() or os.readlink(latest) == before):
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.4))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    result = run(values)
    assert result.resumed_from is not None and result.resumed_from > 0
    assert_same(whole, tmp_path / "run", step=30)


def test_sigint_of_a_real_process_exits_130(make_values: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_values(steps=100000, log_every=1)))
    log = tmp_path / "run" / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "spikelm", "train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and (not log.exists() or '"event": "step"' not in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "SIGINT: stopped after step" in errors and "Traceback" not in errors
    (newest,) = (tmp_path / "run").glob("latest")
    record = json.loads((newest / "training.json").read_text())
    assert record["progress"]["step"] >= 1
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "interrupted"


def test_stopped_during_evaluation(
    make_values: Any, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation is given up, and made up for on resume."""
    from spikelm.train import evaluation

    original = evaluation.micro_batches

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "micro_batches", interrupted)
        first = run(make_values())
    assert first.interrupted == "SIGINT" and first.step == 4 and first.evaluation is None
    run(make_values())
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("at", [4, 12])
@pytest.mark.parametrize("moment", ["before the sample", "while it is written"])
def test_a_sample_that_a_stop_prevented_is_made_up_for(
    make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, moment: str
) -> None:
    from spikelm import generation

    values = make_values(sample_every=4, sample_tokens=5, eval_every=4)
    run({**values, "out": str(tmp_path / "whole")})
    step, generate = Trainer._train_step, generation.generate

    def stopped_step(self: Trainer, bar: Any) -> None:
        step(self, bar)
        if self._state.step == at and moment == "before the sample":
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped_writing(model: Any, *args: Any, **options: Any) -> Any:
        for number, piece in enumerate(generate(model, *args, **options)):
            yield piece
            if number == 1 and moment == "while it is written" and trainer._state.step == at:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(TrainConfig.from_dict(values))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped_step)
        patch.setattr(generation, "generate", stopped_writing)
        first = trainer.run()
    assert first.interrupted == "SIGTERM" and first.step == at
    assert at not in [line["step"] for line in trainer.log.read("sample")]
    for _ in range(2):  # once made up for, it is not written again
        run(values)
        assert_same(tmp_path / "whole", tmp_path / "run")
        assert trainer.log.read("sample") == RunLog(tmp_path / "whole" / "log.jsonl").read("sample")


def test_finished_run_is_left_alone(make_values: Any, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}
    result = run(make_values(out=str(whole)))
    assert result.step == 12 and result.resumed_from == 12 and result.evaluation is not None
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")} == before


def test_a_run_can_be_made_longer(make_values: Any, whole: Path) -> None:
    trainer = Trainer(TrainConfig.from_dict(make_values(out=str(whole), steps=14)))
    assert trainer.run().step == 14
    assert "steps changed from 12 to 14" in trainer.log.read("warning")[0]["text"]
    with pytest.raises(CheckpointError, match="has done 14 steps, more than steps=5"):
        run(make_values(out=str(whole), steps=5))


def test_accumulation_may_change(make_values: Any, whole: Path) -> None:
    assert run(make_values(out=str(whole), steps=13, accumulation=2)).step == 13


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim__lr", 1e-4, "optim.lr is 0.003 in the checkpoint and 0.0001 now"),
        ("model__hidden_size", 24, "model.hidden_size is 16 in the checkpoint and 24 now"),
        ("model__neuron", {"name": "lif"}, "model.neuron"),
        ("data__block_length", 8, "data.block_length is 16 in the checkpoint and 8 now"),
        ("seed", 3, "seed is 0 in the checkpoint and 3 now"),
        ("batch_size", 2, "batch_size is 4"),
        ("schedule__name", "wsd", "schedule.name is 'cosine' in the checkpoint and 'wsd' now"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    make_values: Any, whole: Path, key: str, value: Any, words: str
) -> None:
    with pytest.raises(CheckpointError, match="holds another run") as caught:
        run(make_values(**{"out": str(whole), key: value}))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_changed_text_is_refused_and_moved_text_is_not(make_values: Any, whole: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "train.txt", tmp_path / "moved.txt")
    assert run(make_values(out=str(whole), data__train=str(tmp_path / "moved.txt"))).step == 12
    (tmp_path / "train.txt").write_text("another text " * 300)
    with pytest.raises(CheckpointError, match=r"data.train is .* now, and they do not hold the same"):
        run(make_values(out=str(whole)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resume": False}, r"holds a run already \(step 12\)"),
        ({"seed": 3}, "holds another run"),
        ({"steps": 11}, "has done 12 steps"),
    ],
)
def test_a_refused_run_deletes_nothing(
    make_values: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    run(make_values(keep=5, checkpoint_every=2))
    folder = tmp_path / "run" / "checkpoints"
    steps = [f"step-{step:08d}" for step in (4, 6, 8, 10, 12)]
    before = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(CheckpointError, match=words):
        run(make_values(keep=1, checkpoint_every=2, **changes))
    assert sorted(path.name for path in folder.iterdir()) == steps
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    run(make_values(keep=1, checkpoint_every=2))
    assert [path.name for path in folder.iterdir()] == steps[-1:]


def test_two_processes_in_one_folder(make_values: Any, tmp_path: Path) -> None:
    trainer = Trainer(TrainConfig.from_dict(make_values()))
    trainer.store.open()
    with trainer.store.locked():
        half = trainer.store.folder / ".partial" / "step-00000003"  # as while the first one saves
        half.mkdir(parents=True)
        with pytest.raises(TrainingError, match="another process is training"):
            run(make_values())
        assert half.is_dir()
    assert run(make_values()).step == 12
    assert not half.parent.exists()


def test_a_text_that_changed_in_its_place_is_refused(make_values: Any, tmp_path: Path) -> None:
    run(make_values(steps=3))
    (tmp_path / "train.txt").write_text("another text " * 300)
    with pytest.raises(CheckpointError, match=r"as in the checkpoint, but what it holds has changed since"):
        run(make_values(steps=3))
