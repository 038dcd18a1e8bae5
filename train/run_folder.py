"""The folder of a run: made, seen by all ranks, and held by one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spikelm.errors import TrainingError
from spikelm.train.files import why
from spikelm.train.ranks import Ranks

REPLACED = "replaced-"
"""Prefix of a checkpoint's name while another one takes its place."""


class RunFolder:
    """``out`` with ``checkpoints/`` in it, and in that ``.partial/`` for what is being written.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / "checkpoints"

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
    def held(self, ranks: Ranks) -> Iterator[None]:
        """:meth:`open` and :meth:`locked` by rank 0, for all ranks.

        Raises:
            TrainingError: rank 0 cannot have the folder, or another rank does not see it; the same on every
                rank.
        """
        with contextlib.ExitStack() as stack:
            problem = None
            if ranks.main:
                try:
                    self.open()
                    stack.enter_context(self.locked())
                except TrainingError as error:
                    if ranks.world_size == 1:
                        raise
                    problem = str(error)
            if problem := ranks.broadcast(problem):
                raise TrainingError(problem)
            seen = ranks.gather(self.folder.is_dir())
            if not all(seen):
                raise TrainingError(
                    f"rank {seen.index(False)} does not see {self.folder}, which rank 0 made; "
                    "choose an out folder on a file system that all ranks share"
                )
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

    @property
    def _partial(self) -> Path:
        return self.folder / ".partial"

    def _clear_partial(self) -> None:
        """Remove what is left of a write; a checkpoint that was about to be replaced gets its name back."""
        if not self._partial.exists():
            return
        for replaced in self._partial.glob(f"{REPLACED}*"):
            final = self.folder / replaced.name.removeprefix(REPLACED)
            if not final.exists():
                replaced.rename(final)
        shutil.rmtree(self._partial)

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"the run's folder {self.out} cannot be written ({why(error)}); choose another: out=FOLDER"
        )
