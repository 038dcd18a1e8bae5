"""When a run is saved, what a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import contextlib
import copy
import json
import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from spikelm.checkpoint import CONFIG, WEIGHTS_INDEX, config_json
from spikelm.errors import CheckpointError, TrainingError
from spikelm.train.backend import Backend
from spikelm.train.card import CARD, model_card
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.log import RunLog
from spikelm.train.reporting import Bar
from spikelm.train.shards import StoredTensors
from spikelm.train.snapshot import LANES, RANDOM, Snapshot, restore_random
from spikelm.train.step import StepRunner
from spikelm.train.training_state import Identity, Progress, Record
from spikelm.train.watchdog import LONG
from spikelm.train.writer import EXPECTED, Write, reason

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.config import TrainConfig

_LOOK = 0.05
"""Seconds between two agreements of waiting ranks."""

PATIENCE = 15.0
"""Seconds that a run which ends with an error waits for other ranks' parts of a checkpoint."""


class Saving:
    """Writes and reads the checkpoints of one run. Entered while the run goes on; leaving it ends all writes.

    Args:
        config: how often, how many.
        store: where to.
        backend, runner: hold what is saved.
        tokenizer: saved beside the model.
        identity: says whether a checkpoint belongs to this run.
        log: told about every checkpoint; its curve goes into the model card.
        warn: shows and logs a warning.
        parameters: of the whole model, for its card.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: CheckpointStore,
        backend: Backend,
        runner: StepRunner,
        tokenizer: Tokenizer,
        identity: Identity,
        log: RunLog,
        warn: Callable[[Bar, str], None],
        parameters: int,
    ) -> None:
        self._config, self._store = config, store
        self._backend, self._runner = backend, runner
        self._tokenizer, self._identity = tokenizer, identity
        self._log, self._warn, self._parameters = log, warn, parameters
        self._snapshot = Snapshot(backend.ranks)
        self._write: Write | None = None
        self._blocked = self._waited = 0.0
        self._overlaps, self._told = 0, False

    def __enter__(self) -> Saving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what is being written; after an error of the run, without asking the other ranks."""
        write, self._write = self._write, None
        if write is None:
            return
        with self._backend.ranks.watchdog.phase("checkpoint", allowance=LONG):
            write.end(PATIENCE)
        if write.error is not None:
            told = self._store.failure(write.step, reason(write.error))
            with contextlib.suppress(TrainingError):  # the run's own error comes first
                self._log.write("warning", {"step": write.step, "text": str(told)})

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, as far as the ranks agreed."""
        return self._write is None

    def due(self, progress: Progress, stopping: bool) -> bool:
        """Whether this step is to be saved: every N steps, milestones, the best, the end, and a stop."""
        config, step = self._config, progress.step
        regular = any(
            every > 0 and step % every == 0 for every in (config.checkpoint_every, config.milestone_every)
        )
        best = config.keep_best and progress.best_step == step
        return step == config.steps or stopping or regular or best

    # --- writing --------------------------------------------------------------------------------------------

    def save(self, progress: Progress, bar: Bar) -> None:
        """Begin a checkpoint when the one before is finished; with ``async_checkpoints: false`` end it too.

        Raises:
            CheckpointError: it cannot be written, or the one before could not; older ones are untouched. The
                same on every rank.
        """
        self._end_before(bar)
        started = time.perf_counter()
        ranks, step = self._backend.ranks, progress.step
        attempt, problem = f"step-{step:08d}-{secrets.token_hex(4)}", ""
        if ranks.main:
            try:
                self._store.begin(attempt)
            except OSError as error:
                self._store.give_up()
                problem = reason(error)
        attempt, problem = ranks.broadcast([attempt, problem])
        if problem:
            raise self._store.failure(step, problem)
        progress.data = self._runner.position(progress.samples)
        record = Record(progress=copy.deepcopy(progress), identity=self._identity)
        contents = self._snapshot.take(self._backend, self._runner)
        self._write = Write(
            self._store,
            ranks,
            attempt,
            record,
            contents,
            lambda folder: self._write_rest(folder, record, contents.index),
        )
        self._write.start()
        self._blocked, self._waited = time.perf_counter() - started, 0.0
        if not self._config.async_checkpoints:
            self.finish(bar)

    def check(self, bar: Bar) -> None:
        """Look, between two steps, how the write goes; called on all ranks together.

        Raises:
            CheckpointError: it failed on some rank; the same on every rank.
        """
        if self._write is not None:
            self._settle(self._write)

    def finish(self, bar: Bar) -> None:
        """Wait until nothing is being written; called on all ranks together.

        Raises:
            CheckpointError: the write failed on some rank; the same on every rank.
        """
        started = time.perf_counter()
        before = self._waited
        alone = self._backend.ranks.world_size == 1
        while self._write is not None:
            # One rank waits for its thread; several agree again and again, because any of them may fail.
            self._write.wait(None if alone else _LOOK)
            self._waited = before + time.perf_counter() - started
            self._settle(self._write)

    def _end_before(self, bar: Bar) -> None:
        """Wait for the checkpoint before, and say so."""
        write, started = self._write, time.perf_counter()
        if write is None:
            return
        if not self._backend.ranks.any(not write.over):
            self.finish(bar)
            return
        self._overlaps += 1
        self.finish(bar)
        seconds = time.perf_counter() - started
        if seconds > 1.0 and not self._told:
            self._told = True
            self._warn(
                bar,
                f"the checkpoint of step {write.step} was still being written when the next one was due, and "
                f"training waited {seconds:.1f} s; a larger checkpoint_every or a faster disk avoids that",
            )

    def _settle(self, write: Write) -> None:
        """Agree how the write goes: forget one that is done, raise for one that failed."""
        ranks = self._backend.ranks
        failed, running = ranks.totals(float(write.over and write.error is not None), float(not write.over))
        if failed or not running:
            self._write = None
            with ranks.watchdog.phase("checkpoint", allowance=LONG):
                write.end(patience=0.0)
        if failed:
            self._fail(write)
        if not running and (written := write.written) is not None:
            figures = {
                "blocked_seconds": round(self._blocked + self._waited, 4),
                "waited_seconds": round(self._waited, 4),
                "written_seconds": round(written.seconds, 4),
                "bytes": written.bytes,
                "files": written.files,
                "overlaps": self._overlaps,
            }
            self._log.write("checkpoint", {"step": write.step, **figures})

    def _fail(self, write: Write) -> None:
        """Raise what went wrong: the same sentence on every rank, a fault of the program as it is."""
        ranks, error = self._backend.ranks, write.error
        mine = None if error is None else [reason(error), write.elsewhere, isinstance(error, EXPECTED)]
        told = ranks.gather(mine)
        first = min(
            (rank for rank, found in enumerate(told) if found is not None), key=lambda rank: told[rank][1]
        )
        if error is not None and not isinstance(error, EXPECTED):
            if ranks.world_size > 1:  # another rank may be the first to end the run
                traceback.print_exception(error)
            raise error
        if not all(found is None or found[2] for found in told):
            raise TrainingError(f"rank {first} failed while it wrote a checkpoint ({told[first][0]})")
        where = f"rank {first}: " if ranks.world_size > 1 and not told[first][1] else ""
        raise self._store.failure(write.step, where + told[first][0]) from error

    def _write_rest(self, folder: Path, record: Record, index: str | None) -> set[str]:
        """Rank 0's files beside the tensors; those without checksum are returned."""
        model = self._backend.model
        content = config_json(model.config, model.embedding.weight.dtype)
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self._tokenizer.save(folder)
        if index is not None:
            (folder / WEIGHTS_INDEX).write_text(index, encoding="utf-8")
        card = model_card(
            record,
            self._log.read(),
            parameters=self._parameters,
            backend=self._backend.name,
            world_size=self._backend.ranks.world_size,
        )
        (folder / CARD).write_text(card, encoding="utf-8")
        return {CARD}

    # --- reading --------------------------------------------------------------------------------------------

    def resume(self, warn: Callable[[str], None]) -> Progress | None:
        """Restore the newest usable checkpoint; where it was made, or None for a new run.

        Raises:
            CheckpointError: see :meth:`examine`.
        """
        found = self.examine(warn)
        if found is None:
            return None
        folder, record = found
        self._restore(folder)
        # Only a run that is certainly this one may move or remove checkpoints.
        return self._adopted(record, warn)

    def examine(self, warn: Callable[[str], None]) -> tuple[Path, Record] | None:
        """The checkpoint that the run would go on from, or None for a new run; nothing is changed.

        Raises:
            CheckpointError: the folder holds a run and ``resume`` is false, or it is another run.
        """
        found = self._store.newest(warn, self._backend.ranks)
        if found is None:
            return None
        record = found[1]
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
        return found

    def roll_back(self, bar: Bar, warn: Callable[[str], None]) -> Progress | None:
        """Restore the newest usable checkpoint of this very run, or None where there is none yet.

        Raises:
            CheckpointError: the checkpoint being written failed, or none can be used.
        """
        self.finish(bar)
        found = self._store.newest(warn, self._backend.ranks)
        if found is None:
            return None
        folder, record = found
        self._restore(folder)
        return self._adopted(record, warn)

    def _adopted(self, record: Record, warn: Callable[[str], None]) -> Progress:
        """Where the run goes on once the checkpoint of ``record`` is the newest one."""
        ranks, problem, kept = self._backend.ranks, "", True
        if ranks.main:
            try:
                self._store.adopt(record, warn)
                kept = record.progress.best_step in self._store.steps()
            except TrainingError as error:
                problem = str(error)
        problem, kept = ranks.broadcast([problem, kept])
        if problem:
            raise TrainingError(problem)
        if self._config.keep_best and not kept:
            # The best checkpoint is gone or was never kept, so the next evaluation is the best there is.
            return replace(record.progress, best=None, best_step=-1)
        return replace(record.progress)

    def _restore(self, folder: Path) -> None:
        stored = StoredTensors(folder)
        self._backend.restore(stored.read)
        self._runner.restore_lanes(stored.under(LANES))
        restore_random(stored.under(RANDOM), self._backend.ranks.rank, self._backend.device)
        # Nobody may remove or replace files that another rank still reads.
        self._backend.ranks.barrier()
