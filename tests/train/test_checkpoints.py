"""Checkpoints on disk: whole or absent, checked before use, found again after every accident."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import load_model, load_tokenizer
from spikelm.errors import CheckpointError, SpikeLMError, TrainingError
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.config import TrainConfig
from spikelm.train.ranks import Ranks
from spikelm.train.snapshot import Contents
from spikelm.train.trainer import Trainer
from spikelm.train.training_state import Identity, Progress, Record, read_record
from spikelm.train.writer import Write

IDENTITY = Identity(config={"seed": 1, "optim": {"lr": 0.1}}, model={"hidden_size": 8})


def record(step: int) -> Record:
    return Record(progress=Progress(step=step, nats=0.1 + step), identity=IDENTITY)


def contents(*names: str) -> Contents:
    """A share of a checkpoint: files of one tensor each."""
    return Contents(files={name: {"x": torch.arange(100.0)} for name in names}, index=None)


FILES = ("model.safetensors", "training.safetensors")


def card(folder: Path) -> set[str]:
    (folder / "README.md").write_text("# card")
    (folder / "config.json").write_text("{}")
    return {"README.md"}


def save(opened: CheckpointStore, step: int, best: int = -1, ranks: int = 1) -> None:
    """Write a checkpoint as ``ranks`` ranks do; what goes wrong in a thread goes wrong here."""
    of = Record(progress=Progress(step=step, nats=0.1 + step, best_step=best), identity=IDENTITY)
    opened.begin("attempt")
    for rank in reversed(range(ranks)):
        names = (
            FILES
            if ranks == 1
            else (f"training-{rank + 1:05d}-of-{ranks:05d}.safetensors", *FILES[: rank < 1])
        )
        write = Write(opened, Ranks(rank=rank, world_size=ranks), "attempt", of, contents(*names), card)
        write.start()
        write.end(patience=0.0)
        if write.error is not None:
            raise write.error


def store(tmp_path: Path, keep: int = 2, steps: tuple[int, ...] = (), ranks: int = 1) -> CheckpointStore:
    opened = CheckpointStore(tmp_path / "run", keep)
    opened.open()
    for step in steps:
        save(opened, step, ranks=ranks)
    return opened


def newest(opened: CheckpointStore) -> tuple[int, list[str]]:
    warnings: list[str] = []
    found = opened.newest(warnings.append)
    if found is not None:
        opened.adopt(found[1], warnings.append)
    return (-1 if found is None else found[1].progress.step), warnings


def test_round_trip_and_retention(tmp_path: Path) -> None:
    opened = store(tmp_path, keep=2, steps=(1, 2, 3, 4))
    assert opened.steps() == [3, 4]
    assert newest(opened) == (4, [])
    assert os.readlink(opened.latest) == "checkpoints/step-00000004"
    assert read_record(opened.path(4)) == record(4)
    assert sorted(path.name for path in opened.folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_empty_folder_has_none(tmp_path: Path) -> None:
    assert newest(store(tmp_path)) == (-1, [])


@pytest.mark.parametrize(("keep", "ranks", "step"), [(1, 1, 3), (2, 1, 3), (2, 2, 3), (1, 1, 2), (2, 2, 2)])
def test_every_moment_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, ranks: int, step: int
) -> None:
    """A kill before the n-th operation on the disk, for every n, leaves a usable newest checkpoint.

    Also when the newest one is written again (step 2), and on whichever rank the kill is.
    """

    class Killed(BaseException):
        pass

    base = store(tmp_path, keep=keep, steps=(1, 2), ranks=ranks).out
    out = tmp_path / "copy"
    spots: list[tuple[Any, str]] = [
        *((os, name) for name in ("rename", "fsync", "open")),
        *((Path, name) for name in ("rename", "replace", "symlink_to", "mkdir", "unlink", "open")),
        (shutil, "rmtree"),
    ]
    count, limit = 0, 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == limit:
                raise Killed
            return original(*args, **kwargs)

        return call

    found = []
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out, symlinks=True)
        count, limit = 0, limit + 1
        try:
            with monkeypatch.context() as patch:
                for owner, name in spots:
                    patch.setattr(owner, name, counted(getattr(owner, name)))
                save(CheckpointStore(out, keep), step, ranks=ranks)
            break
        except Killed:
            pass
        again = CheckpointStore(out, keep)
        again.open()
        with again.locked():
            usable, warnings = newest(again)
        found.append(usable)
        assert not warnings
        assert again.latest.resolve() == again.path(usable).resolve()
        assert len(again.steps()) <= keep
        assert not list(again.folder.glob(".*"))
        save(again, 3)
        assert newest(again) == (3, [])
    assert found == sorted(found) and set(found) == {2, step} and len(found) > 20


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (lambda folder: flip(folder / "model.safetensors"), "is corrupted"),
    "truncated": (
        lambda folder: os.truncate(folder / "training.safetensors", 10),
        "has 10 bytes instead of 504",
    ),
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "record missing": (lambda folder: (folder / "training.json").unlink(), "training.json is missing"),
    "record truncated": (lambda folder: os.truncate(folder / "training.json", 40), "cannot be read"),
    "record empty": (lambda folder: os.truncate(folder / "training.json", 0), "cannot be read"),
    "record changed": (
        lambda folder: (folder / "training.json").write_text(
            (folder / "training.json").read_text().replace('"step": 2', '"step": 9')
        ),
        "its checksum does not match",
    ),
    "record not text": (
        lambda folder: (folder / "training.json").write_bytes(b"\xff\xfe\x00"),
        "cannot be read",
    ),
    "record is a list": (
        lambda folder: (folder / "training.json").write_text("[1]"),
        "checksum does not match",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_falls_back_with_a_warning(tmp_path: Path, damage: str) -> None:
    opened = store(tmp_path, keep=2, steps=(1, 2))
    act, words = DAMAGES[damage]
    act(opened.path(2))
    step, warnings = newest(opened)
    assert step == 1
    assert "checkpoint of step 2 is unusable" in warnings[0] and words in warnings[0]
    assert (opened.folder / "corrupt-step-00000002").is_dir()  # kept for whoever wants to look
    assert opened.latest.resolve() == opened.path(1).resolve()
    save(opened, 2)
    assert newest(opened) == (2, [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_damaged_is_refused(tmp_path: Path, damage: str) -> None:
    opened = store(tmp_path, keep=2, steps=(1, 2))
    for step in (1, 2):
        DAMAGES["bit flip" if step == 1 else damage][0](opened.path(step))
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        newest(opened)
    assert "\n" not in str(caught.value)
    assert opened.steps() == [1, 2]  # nothing was touched


def test_pruning_never_removes_the_last_good_one(tmp_path: Path) -> None:
    opened = store(tmp_path, keep=2, steps=(5, 10))
    opened.keep = 1
    flip(opened.path(10) / "model.safetensors")
    assert newest(opened)[0] == 5
    save(opened, 7)
    assert opened.steps() == [7] and newest(opened) == (7, [])


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Neither opening nor looking for the newest one may touch a folder that may be another run's."""
    opened = store(tmp_path, keep=5, steps=(1, 2, 3, 4, 5))
    flip(opened.path(5) / "model.safetensors")
    (opened.folder / ".partial").mkdir()
    (opened.folder / ".partial" / "half").touch()
    opened.latest.unlink()
    before = {path: path.stat().st_mtime_ns for path in opened.out.rglob("*") if path != opened.folder}
    other = CheckpointStore(opened.out, keep=1)
    other.open()
    found = other.newest(lambda text: None)
    assert found is not None and found[1].progress.step == 4
    after = {path: path.stat().st_mtime_ns for path in opened.out.rglob("*") if path != opened.folder}
    assert after == before
    with other.locked():
        assert not (other.folder / ".partial").exists()  # it is ours now


@pytest.mark.parametrize("pointer", ["dangling", "older", "missing", "outside"])
def test_pointer_is_mended(tmp_path: Path, pointer: str) -> None:
    opened = store(tmp_path, keep=2, steps=(1, 2))
    opened.latest.unlink()
    if pointer != "missing":
        targets = {
            "dangling": "checkpoints/step-00000009",
            "older": "checkpoints/step-00000001",
            "outside": "/",
        }
        opened.latest.symlink_to(targets[pointer])
    step, warnings = newest(opened)
    assert step == 2 and opened.latest.resolve() == opened.path(2).resolve()
    assert bool(warnings) == (pointer == "dangling")


def test_a_real_folder_called_latest_is_left_alone(tmp_path: Path) -> None:
    opened = store(tmp_path, steps=(1,))
    opened.latest.unlink()
    opened.latest.mkdir()
    assert "is not a link" in newest(opened)[1][0] and opened.latest.is_dir()


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "/dev/null/run"])
def test_unwritable_folder_is_one_sentence(make_values: Any, place: str) -> None:
    with pytest.raises(TrainingError, match="cannot be written") as caught:
        Trainer(TrainConfig.from_dict(make_values(out=place))).run()
    assert "\n" not in str(caught.value)


def test_no_space_left(make_values: Any, tmp_path: Path) -> None:
    """A file-size limit makes the operating system refuse the write, as a full disk does."""
    run = tmp_path / "run"
    Trainer(TrainConfig.from_dict(make_values(steps=12, schedule__name="constant", checkpoint_every=6))).run()
    largest = max(path.stat().st_size for path in (run / "latest" / "x").parent.resolve().iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = Trainer(
        TrainConfig.from_dict(make_values(steps=18, schedule__name="constant", checkpoint_every=6))
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        with pytest.raises(CheckpointError, match="step 18 cannot be written") as caught:
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "\n" not in message and "step-00000012 is intact" in message and "make room" in message
    assert trainer.store.steps() == [6, 12]
    assert not list(trainer.store.folder.glob(".*"))
    assert Trainer(TrainConfig.from_dict(make_values(steps=18, schedule__name="constant"))).run().step == 18


def test_a_checkpoint_is_a_model_folder(finished_run: Path) -> None:
    """`latest` serves every other command; nothing in it is a pickle, and everybody may read it."""
    folder = finished_run / "latest"
    assert load_model(folder).config.hidden_size == 16
    assert load_tokenizer(folder).vocab_size == 256
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}
    values = json.loads((folder / "training.json").read_text())
    unsealed = {"training.json", "README.md"}  # the card may be edited
    assert set(values["files"]) == {path.name for path in folder.iterdir()} - unsealed


def test_all_files_have_ordinary_permissions(finished_run: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (finished_run / "latest").iterdir()}
    assert modes == {0o666 & ~umask}


def test_errors_are_of_the_package() -> None:
    assert issubclass(CheckpointError, SpikeLMError) and issubclass(TrainingError, SpikeLMError)
