"""Copies of checkpoints for other people: the model, its tokenizer and its card, without training state."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from spikelm.checkpoint import CONFIG, read_config, replace_folder, sync_folder
from spikelm.errors import CheckpointError
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.files import why
from spikelm.train.training_state import RECORD, check_file, read_values


def find_checkpoint(run: Path, step: int | None = None, best: bool = False) -> Path:
    """A checkpoint of a run.

    Args:
        run: folder of a run, or a checkpoint itself.
        step: the checkpoint after this many steps; None takes the newest.
        best: take the one with the lowest held-out bits per byte.

    Raises:
        CheckpointError: there is none.
    """
    if (run / CONFIG).is_file():
        if step is not None or best:
            raise CheckpointError(f"{run} is one checkpoint; name the folder of its run to choose another")
        return run
    store = CheckpointStore(run, keep=1)
    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{run} holds no checkpoint; expected the folder of a run (key out), or one of its checkpoints"
        )
    if best:
        if not (store.best / CONFIG).is_file():
            raise CheckpointError(
                f"{run} has no best checkpoint; train with keep_best=true, or choose one with --step: "
                f"{', '.join(map(str, steps))}"
            )
        return store.best.resolve()
    if step is None:
        return store.path(steps[-1])
    if step not in steps:
        raise CheckpointError(
            f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
        )
    return store.path(step)


def export(run: Path, out: Path, step: int | None = None, best: bool = False) -> Path:
    """Copy what others need of a checkpoint, after its checksums were compared; whole or not at all.

    Args:
        run: folder of a run, or a checkpoint itself.
        out: the new folder.
        step: the checkpoint after this many steps; None takes the newest.
        best: take the one with the lowest held-out bits per byte.

    Returns:
        the checkpoint that was copied.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or ``out`` exists or cannot be written.
    """
    source = find_checkpoint(run, step, best)
    read_config(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; choose a new folder")
    sealed: dict[str, Any] = read_values(source)["files"] if (source / RECORD).is_file() else {}
    names = [path.name for path in sorted(source.iterdir()) if not path.name.startswith(("training", "."))]
    temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in names:
            shutil.copyfile(source / name, temporary / name)
            if name in sealed:
                check_file(temporary / name, sealed[name], source / name)
        sync_folder(temporary)
        replace_folder(temporary, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({why(error)}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return source
