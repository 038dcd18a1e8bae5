"""When checkpoints are written, in the background or not, and which of them stay."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open

from spikelm.errors import CheckpointError
from spikelm.tokenizer import Tokenizer
from spikelm.train import periodic, writer
from spikelm.train.config import TrainConfig
from spikelm.train.shards import Shares, StoredTensors, write_safetensors
from spikelm.train.trainer import Trainer

from .workers import break_trainer

STEADY = {"schedule__name": "constant", "log_every": 1}


def trainer(values: dict[str, Any]) -> Trainer:
    return Trainer(TrainConfig.from_dict(values))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> float:
    """A disk that takes this many seconds for a file."""
    seconds = 0.3

    def write(*args: Any) -> Any:
        time.sleep(seconds)
        return write_safetensors(*args)

    monkeypatch.setattr(writer, "write_safetensors", write)
    return seconds


# --- in the background --------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(make_values: Any, slow: float) -> None:
    """What is written is what was there at its step, however far training went meanwhile."""
    run = trainer(make_values(checkpoint_every=6, eval_every=0, **STEADY))
    seen = []
    step = run._train_step

    def watched(bar: Any) -> None:
        step(bar)
        seen.append((run._state.step, run.store.steps()))

    run._train_step = watched  # type: ignore[method-assign]
    run.run()
    assert (8, []) in seen  # step 6 is still being written
    events = {line["step"]: line for line in run.log.read("checkpoint")}
    assert set(events) == {6, 12}
    assert (
        events[6]["written_seconds"]
        > 2 * slow
        > 10 * (events[6]["blocked_seconds"] - events[6]["waited_seconds"])
    )
    assert events[12]["waited_seconds"] > slow  # nothing is left to do but wait
    at_six = trainer(make_values(out=str(run.out.parent / "six"), steps=6, eval_every=0, **STEADY))
    at_six.run()
    for name in ("model.safetensors", "training.safetensors"):
        a, b = (load_file(made.store.path(6) / name) for made in (run, at_six))
        assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_checkpoints_that_overlap_are_written_one_after_the_other(
    make_values: Any, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(make_values(checkpoint_every=1, keep=20, steps=5, eval_every=0, **STEADY))
    run.run()
    events = run.log.read("checkpoint")
    assert [line["step"] for line in events] == [1, 2, 3, 4, 5]
    assert events[-1]["overlaps"] == 4 and all(line["waited_seconds"] > 0 for line in events)
    assert run.store.steps() == [1, 2, 3, 4, 5] and run.store.newest(print) is not None
    assert not run.log.read("warning")  # it waited less than a second each time


def test_a_slow_disk_is_told_once(make_values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: Any) -> Any:
        time.sleep(0.6)
        return write_safetensors(*args)

    monkeypatch.setattr(writer, "write_safetensors", write)
    run = trainer(make_values(checkpoint_every=1, steps=3, eval_every=0, **STEADY))
    run.run()
    (warning,) = run.log.read("warning")
    assert "the checkpoint of step 1 was still being written" in warning["text"]


def test_without_background(make_values: Any, slow: float) -> None:
    run = trainer(make_values(checkpoint_every=6, async_checkpoints=False, eval_every=0, **STEADY))
    run.run()
    for line in run.log.read("checkpoint"):
        assert line["blocked_seconds"] >= line["written_seconds"] > 2 * slow and line["overlaps"] == 0


def test_a_failed_write_is_told_at_the_next_step(make_values: Any) -> None:
    run = trainer(make_values(steps=10**6, eval_every=0, **STEADY))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        break_trainer(run, {"kind": "disk", "rank": 0, "bytes": 20_000})
        with pytest.raises(CheckpointError, match=r"step 3 cannot be written .*File too large.*no earlier"):
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 3 <= run._state.step < 20
    assert not list(run.store.folder.iterdir())
    assert trainer(make_values(steps=10**6, eval_every=0, **STEADY))._identity  # the folder is free again


def test_an_error_of_the_run_lets_a_write_finish(make_values: Any, slow: float) -> None:
    class Broken(Exception):
        pass

    run = trainer(make_values(eval_every=0, **STEADY))
    original = run._runner.take

    def take(*args: Any) -> Any:
        if args[1] == 4:
            raise Broken
        return original(*args)

    run._runner.take = take  # type: ignore[method-assign]
    with pytest.raises(Broken):
        run.run()
    assert run.store.steps() == [3] and run.store.newest(print) is not None
    assert not (run.store.folder / ".partial").exists()
    assert trainer(make_values(eval_every=0, **STEADY)).run().resumed_from == 3


def test_a_fault_of_the_program_keeps_its_traceback(
    make_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> str:
        raise KeyError("card")

    monkeypatch.setattr("spikelm.train.saving.model_card", wrong)
    with pytest.raises(KeyError, match="card"):
        trainer(make_values()).run()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_waits_for_its_checkpoint(make_values: Any, slow: float, name: str) -> None:
    run = trainer(make_values(eval_every=0, **STEADY))
    break_trainer(run, {"kind": "signal", "rank": 0, "step": 5, "name": name})
    result = run.run()
    assert result.interrupted == name and result.step == 5
    assert run.store.steps() == [3, 5] and run.store.newest(print) is not None
    assert [line["event"] for line in run.log.read()][-2:] == ["checkpoint", "interrupted"]


def test_host_memory_is_kept(make_values: Any) -> None:
    run = trainer(make_values())
    run.run()
    before = {name: buffer.data_ptr() for name, buffer in run._saving._snapshot._buffers.items()}
    run._saving._snapshot.take(run._backend, run._runner)
    assert {name: buffer.data_ptr() for name, buffer in run._saving._snapshot._buffers.items()} == before


# --- which of them stay -------------------------------------------------------------------------------------


def test_milestones_stay(make_values: Any) -> None:
    run = trainer(make_values(milestone_every=4, checkpoint_every=3, keep=1, steps=11))
    run.run()
    assert run.store.steps() == [4, 8, 11]


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Step -> bits per byte that an evaluation finds."""
    chosen: dict[int, float] = {}
    original = periodic.evaluate

    def evaluate(*args: Any, step: int, **kwargs: Any) -> Any:
        found = original(*args, step=step, **kwargs)
        assert found is not None
        return dataclasses.replace(found[0], bits_per_byte=chosen[step]), found[1]

    monkeypatch.setattr(periodic, "evaluate", evaluate)
    return chosen


def test_the_best_stays_until_there_is_a_better_one(make_values: Any, marks: dict[int, float]) -> None:
    marks.update({2: 5.0, 4: 3.0, 6: 4.0, 8: float("nan"), 10: 3.0, 12: 3.5})
    values = make_values(keep_best=True, keep=1, checkpoint_every=0, eval_every=2, schedule__name="constant")
    run = trainer({**values, "steps": 12})
    run.run()
    assert [line["step"] for line in run.log.read("checkpoint")] == [2, 4, 12]
    assert run.store.steps() == [4, 12]
    assert os.readlink(run.out / "best") == "checkpoints/step-00000004"
    assert os.readlink(run.out / "latest") == "checkpoints/step-00000012"
    marks.update({14: 3.2, 16: 2.0, 18: 2.5})
    trainer({**values, "steps": 18}).run()
    assert run.store.steps() == [16, 18] and (run.out / "best").resolve() == run.store.path(16).resolve()


def test_a_link_to_a_best_one_that_is_gone_is_mended(make_values: Any, marks: dict[int, float]) -> None:
    marks.update({4: 3.0, 8: 4.0, 12: 2.0, 14: 2.5})
    values = make_values(keep_best=True, keep=3, checkpoint_every=2, schedule__name="constant")
    run = trainer(values)
    run.run()
    assert (run.out / "best").resolve() == run.store.path(12).resolve()
    os.truncate(run.store.path(12) / "model.safetensors", 10)
    marks.update({12: 3.5})
    again = trainer(values)
    again.run()
    assert not run.store.path(4).exists()  # it made room for step 12's first checkpoint
    assert (run.out / "best").resolve() == run.store.path(12).resolve()
    assert "checkpoint of step 12 is unusable" in again.log.read("warning")[0]["text"]


def test_without_keep_best_there_is_no_link(make_values: Any, whole: Path) -> None:
    assert not (whole / "best").is_symlink()
    progress = json.loads((whole / "latest" / "training.json").read_text())["progress"]
    assert progress["best_step"] in (4, 8, 12) and progress["best"] > 0


def test_another_tokenizer_is_told(make_values: Any, whole: Path, tmp_path: Path) -> None:
    Tokenizer.train_bpe([(tmp_path / "train.txt").read_text()], 300).save(tmp_path / "words")
    with pytest.raises(
        CheckpointError, match=r"another run: data.tokenizer is 'bytes' in the checkpoint and .*words' now"
    ) as caught:
        trainer(make_values(out=str(whole), data__tokenizer=str(tmp_path / "words"))).run()
    assert "\n" not in str(caught.value)


# --- files --------------------------------------------------------------------------------------------------


def test_files_are_read_by_safetensors(tmp_path: Path) -> None:
    """Every dtype, also scalars and tensors without elements; what lies between is not looked at."""
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors = {f"{dtype}": torch.randn(3, 5).to(dtype) for dtype in floats}
    tensors |= {f"{dtype}": torch.randint(0, 100, (7,)).to(dtype) for dtype in integers}
    tensors |= {"flags": torch.rand(9) > 0.5, "scalar": torch.tensor(3.0), "none": torch.empty(0, 4)}
    tensors |= {"f8": torch.randn(5).to(torch.float8_e4m3fn), "turned": torch.randn(4, 6).t()}
    seal = write_safetensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert seal.bytes == len(data)
    import hashlib

    assert seal.sha256 == hashlib.sha256(data).hexdigest()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].float(), value.float()), name
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_are_even_and_complete(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikelm.train.shards.WEIGHTS_LIMIT", 5000)
    sizes = [(f"model/{i}", 700 + 13 * i) for i in range(30)]
    sizes += [(f"optimizer/0/{i}/{key}", 4 * (700 + 13 * i)) for i in range(30) for key in ("a", "b")]
    shares = [Shares(rank, world_size) for rank in range(world_size)]
    owners: dict[str, int] = {}
    load = [0] * world_size
    for name, nbytes in sizes:
        wanting = [rank for rank in range(world_size) if shares[rank].wanted(name, nbytes)]
        assert len(wanting) == 1
        owners[name] = wanting[0]
        load[wanting[0]] += nbytes
    assert max(load) - min(load) <= max(nbytes for _, nbytes in sizes)
    index = json.loads(shares[0].index() or "")
    assert all(json.loads(other.index() or "") == index for other in shares)
    files = {name: shares[owner].file_of(name) for name, owner in owners.items()}
    assert {f"model.{i}": files[f"model/{i}"] for i in range(30)} == index["weight_map"]
    for file in set(index["weight_map"].values()):
        assert sum(nbytes for name, nbytes in sizes if files[name] == file) <= 5000


def test_what_is_read_outlives_the_file(whole: Path) -> None:
    stored = StoredTensors(whole / "latest")
    value = stored.read("model/embedding.weight")
    assert value is not None and stored.read("model/nothing") is None
    before = value.clone()
    os.truncate(whole / "latest" / "model.safetensors", 0)
    assert torch.equal(value, before)
    value.add_(1)  # and is the reader's own


def test_signals_end_a_real_process_well(make_values: Any, tmp_path: Path) -> None:
    """SIGUSR1, which Slurm sends before the limit: exit code 0 and a checkpoint."""
    from .workers import start

    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(make_values(steps=10**6, checkpoint_every=1, eval_every=0, **STEADY)))
    (process,) = start(1, ["-m", "spikelm", "train", str(config)], tmp_path)
    latest, until = tmp_path / "run" / "latest", time.monotonic() + 60
    while process.poll() is None and not latest.exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0, (tmp_path / "rank-0.txt").read_text()
    assert "SIGUSR1: stopped after step" in (tmp_path / "rank-0.txt").read_text()
    run = trainer(make_values(steps=10**6, checkpoint_every=1, eval_every=0, **STEADY))
    newest = run.store.newest(print)
    assert newest is not None and newest[1].progress.step == run.log.read("interrupted")[0]["step"]
