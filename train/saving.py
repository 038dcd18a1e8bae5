"""When a run is saved, what a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from spikelm.checkpoint import PREFIX, read_weights, save_checkpoint
from spikelm.errors import CheckpointError
from spikelm.train.backend import MODEL, Backend
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.step import StepRunner
from spikelm.train.training_state import (
    TENSORS,
    Identity,
    Progress,
    Record,
    write_tensors,
)

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.config import TrainConfig

LANES, RANDOM = "lanes/", "random/"


class Saving:
    """Writes and reads the checkpoints of one run.

    Args:
        config: how often, how many.
        store: where to.
        backend, runner: hold what is saved.
        tokenizer: saved beside the model.
        identity: says whether a checkpoint belongs to this run.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: CheckpointStore,
        backend: Backend,
        runner: StepRunner,
        tokenizer: Tokenizer,
        identity: Identity,
    ) -> None:
        self._config, self._store = config, store
        self._backend, self._runner = backend, runner
        self._tokenizer, self._identity = tokenizer, identity

    def due(self, step: int, stopping: bool) -> bool:
        """Whether step ``step`` is to be saved: every N steps, at the end, and when asked to stop."""
        every = self._config.checkpoint_every
        return step == self._config.steps or stopping or (every > 0 and step % every == 0)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: it cannot be written; older ones are untouched.
        """
        progress.data = self._runner.position(progress.samples)

        def write(folder: Path) -> None:
            backend = self._backend
            save_checkpoint(folder, backend.model, self._tokenizer)
            memory = dict(backend.tensors(lambda name, nbytes: not name.startswith(MODEL)))
            write_tensors(folder, {**memory, **self._runner.lane_tensors(), **random_tensors(backend.device)})

        if self._backend.ranks.main:
            self._store.save(Record(progress=progress, identity=self._identity), write)
        self._backend.ranks.barrier()

    def resume(self, warn: Callable[[str], None]) -> Progress | None:
        """Restore the newest usable checkpoint; where it was made, or None for a new run.

        Raises:
            CheckpointError: the folder holds a run and ``resume`` is false, or it is another run.
        """
        found = self._store.newest(warn)
        if found is None:
            return None
        folder, record = found
        config, out = self._config, self._store.out
        if not config.resume:
            raise CheckpointError(
                f"{out} holds a run already (step {record.progress.step}); resume=true continues it, "
                "another out folder starts anew"
            )
        differences = self._identity.differences(record.identity)
        if differences:
            more = f" (and {len(differences) - 1} more keys differ)" if len(differences) > 1 else ""
            raise CheckpointError(
                f"{out} holds another run: {differences[0]}{more}; "
                "choose another out folder, or go back to that configuration"
            )
        before = record.identity.config.get("steps")
        if before != config.steps:
            warn(f"steps changed from {before} to {config.steps}; the schedule follows from here on")
        step = record.progress.step
        if step > config.steps:
            raise CheckpointError(f"{out} has done {step} steps, more than steps={config.steps}; raise steps")
        self._restore(folder)
        # Only a run that is certainly this one may move or remove checkpoints.
        self._store.adopt(step, warn)
        return replace(record.progress)

    def roll_back(self, warn: Callable[[str], None]) -> Progress | None:
        """Restore the newest usable checkpoint of this very run, or None where there is none yet."""
        found = self._store.newest(warn)
        if found is None:
            return None
        folder, record = found
        self._restore(folder)
        return replace(record.progress)

    def _restore(self, folder: Path) -> None:
        weights = {MODEL + name.removeprefix(PREFIX): value for name, value in read_weights(folder).items()}
        tensors = {**weights, **load_file(folder / TENSORS)}
        self._backend.restore(tensors.get)
        self._runner.restore_lanes({k: v for k, v in tensors.items() if k.startswith(LANES)})
        restore_random(tensors, self._backend.device)


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global generators."""
    tensors = {f"{RANDOM}cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors[f"{RANDOM}cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of :func:`random_tensors`; a run that changes device keeps its new generator."""
    if f"{RANDOM}cpu" in tensors:
        torch.set_rng_state(tensors[f"{RANDOM}cpu"])
    if device.type == "cuda" and f"{RANDOM}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{RANDOM}cuda"], device)
