"""The checkpoints of one run: written whole or not at all, found again whatever happened.

Layout of a run's folder: ``checkpoints/step-00000200/`` (complete, always), ``checkpoints/.partial/`` (being
written), ``latest`` (a link to the newest one, for people and for other commands; resume does not need it),
``log.jsonl`` and ``run.lock``.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from spikelm.errors import CheckpointError, TrainingError
from spikelm.train.files import point_at, sync_folder, why
from spikelm.train.training_state import Record, read_record, write_record

_NAME = re.compile(r"^step-(\d{8,})$")


class CheckpointStore:
    """Checkpoints in ``out/checkpoints``.

    Args:
        out: folder of the run.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, out: Path, keep: int) -> None:
        self.out = out
        self.folder = out / "checkpoints"
        self.latest = out / "latest"
        self.keep = keep

    def open(self) -> None:
        """Create the folders and see whether they can be written; another run's files are not touched.

        Raises:
            TrainingError: the folder cannot be created or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"x")
        except OSError as error:
            raise self._unwritable(error) from error

    @contextlib.contextmanager
    def held(self, mine: bool) -> Iterator[None]:
        """:meth:`open` and :meth:`locked` on the rank that writes (``mine``), nothing on the others."""
        if not mine:
            yield
            return
        self.open()
        with self.locked():
            yield

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's folder, cleared of what an interrupted write left behind.

        The lock goes with the process, however it ends.

        Raises:
            TrainingError: another process trains in the same folder, or the folder cannot be written.
        """
        try:
            stream = (self.out / "run.lock").open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrainingError(
                    f"another process is training in {self.out}; wait for it or choose another out folder"
                ) from error
            try:
                # Only now: before the lock is held, this may be what another process is writing.
                self._clear_partial()
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.match(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimiser steps."""
        return self.folder / f"step-{step:08d}"

    def save(self, record: Record, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint.

        Args:
            record: progress and identity of the run.
            write: writes model and optimiser into the (not yet existing) folder it is given.

        Returns:
            the folder of the complete checkpoint.

        Raises:
            CheckpointError: the disk is full or not writable; older checkpoints are untouched.
        """
        step = record.progress.step
        partial, final = self._partial / f"step-{step:08d}", self.path(step)
        try:
            self._clear_partial()
            self._partial.mkdir()
            write(partial)
            write_record(partial, record)
            sync_folder(partial)
            if final.exists():
                final.rename(self._partial / f"replaced-{step:08d}")
            partial.rename(final)
            sync_folder(self.folder)
            point_at(self.latest, final)
            self._prune(step)
        except (OSError, SafetensorError, CheckpointError) as error:
            with contextlib.suppress(OSError):
                self._clear_partial()
            kept = self.steps()
            rest = f"{self.path(kept[-1])} is intact" if kept else "there is no earlier checkpoint"
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self.folder} "
                f"({why(error.__cause__ or error)}); {rest}; "
                "make room or mend the permissions and start the same command again"
            ) from error
        return final

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, Record] | None:
        """The newest checkpoint whose checksums hold, or None if there is no checkpoint at all.

        Nothing is changed: whose run this is, the caller has yet to see. Then comes :meth:`adopt`.

        Args:
            warn: told about every checkpoint that is passed over.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
        """
        steps = self.steps()
        problem = ""
        for step in reversed(steps):
            folder = self.path(step)
            try:
                record = read_record(folder)
            except CheckpointError as error:
                problem = str(error)
                warn(f"checkpoint of step {step} is unusable: {problem}; trying the one before")
                continue
            return folder, record
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.folder} can be used, "
                f"the oldest because {problem}; "
                "restore one, or choose another out folder to start anew"
            )
        return None

    def adopt(self, step: int, warn: Callable[[str], None]) -> None:
        """Make the checkpoint of ``step`` the newest one: the run goes on from there.

        Later checkpoints (they were passed over) are set aside under names that start with ``corrupt-``,
        ``latest`` is mended, and all but the ``keep`` newest checkpoints are removed.

        Args:
            step: of the checkpoint that :meth:`newest` found.
            warn: told when ``latest`` was not what it should be.

        Raises:
            TrainingError: the folder cannot be written.
        """
        try:
            self._set_aside(after=step)
            self._mend_pointer(self.path(step), warn)
            self._prune(step)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"the run's folder {self.out} cannot be written ({why(error)}); choose another: out=FOLDER"
        )

    @property
    def _partial(self) -> Path:
        return self.folder / ".partial"

    def _clear_partial(self) -> None:
        if self._partial.exists():
            shutil.rmtree(self._partial)

    def _prune(self, newest: int) -> None:
        """Remove all but the ``keep`` newest; each leaves its name first, so no half checkpoint has one."""
        for step in [step for step in self.steps() if step != newest][: -(self.keep - 1) or None]:
            self._partial.mkdir(exist_ok=True)
            doomed = self._partial / f"old-{step:08d}"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)
        self._clear_partial()

    def _set_aside(self, after: int) -> None:
        for step in self.steps():
            if step > after:
                target = self.folder / f"corrupt-step-{step:08d}"
                if target.exists():
                    shutil.rmtree(target)
                self.path(step).rename(target)

    def _mend_pointer(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Point ``latest`` at the checkpoint that is used, if a kill or a person left it elsewhere."""
        if self.latest.is_symlink() and self.latest.resolve() == folder.resolve():
            return
        if self.latest.exists() and not self.latest.is_symlink():
            warn(f"{self.latest} is not a link and stays as it is; the newest checkpoint is {folder}")
            return
        if self.latest.is_symlink() and not self.latest.exists():
            warn(f"{self.latest} pointed at nothing; it now points at {folder}")
        point_at(self.latest, folder)
