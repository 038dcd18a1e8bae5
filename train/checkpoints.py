"""The checkpoints of one run: written whole or not at all, found again whatever happened.

Layout of a run's folder: ``checkpoints/step-00000200/`` (complete, always), ``checkpoints/.partial/`` (being
written), ``latest`` and ``best`` (links to the newest one and to the best one, for people and for other
commands; resume does not need them), ``log.jsonl`` and ``run.lock``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spikelm.errors import CheckpointError
from spikelm.train.files import Seal, point_at, sync_folder
from spikelm.train.ranks import Ranks
from spikelm.train.run_folder import REPLACED, RunFolder
from spikelm.train.training_state import Record, check_file, read_values, record_of, write_record

_NAME = re.compile(r"^step-(\d{8,})$")


class CheckpointStore(RunFolder):
    """Checkpoints in ``out/checkpoints``. Rank 0 alone changes anything here but what is being written.

    Args:
        out: folder of the run.
        keep: how many of the newest checkpoints stay.
        milestone_every: checkpoints of these steps stay for ever (0: none).
        keep_best: whether the best one stays and has a link.
    """

    def __init__(self, out: Path, keep: int, milestone_every: int = 0, keep_best: bool = False) -> None:
        super().__init__(out)
        self.latest, self.best = out / "latest", out / "best"
        self.keep, self.milestone_every, self.keep_best = keep, milestone_every, keep_best

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.match(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimiser steps."""
        return self.folder / f"step-{step:08d}"

    # --- writing --------------------------------------------------------------------------------------------

    def partial(self, attempt: str) -> Path:
        """Folder in which one attempt at a checkpoint is written: ``content/``, and reports of the ranks.

        Each attempt has its own, so that what a process of an earlier life still writes harms nobody.
        """
        return self._partial / attempt

    def begin(self, attempt: str) -> None:
        """Make the folder of an attempt.

        Raises:
            OSError: the disk refuses.
        """
        self._clear_partial()
        (self.partial(attempt) / "content").mkdir(parents=True)

    def commit(self, attempt: str, record: Record, files: Mapping[str, Seal]) -> Path:
        """Make what was written (and synced) the newest checkpoint, and remove those that need not stay.

        Args:
            attempt: see :meth:`partial`.
            record: of the run.
            files: size and checksum of every file.

        Returns:
            the folder of the complete checkpoint.

        Raises:
            OSError: the disk refuses; older checkpoints are untouched.
        """
        step = record.progress.step
        content, final = self.partial(attempt) / "content", self.path(step)
        write_record(content, record, files)
        sync_folder(content)
        if final.exists():
            final.rename(self._partial / f"{REPLACED}{final.name}")
        content.rename(final)
        sync_folder(self.folder)
        point_at(self.latest, final)
        best = record.progress.best_step if self.keep_best else -1
        if best in self.steps():
            point_at(self.best, self.path(best))
        self._prune(step, best)
        return final

    def give_up(self) -> None:
        """Remove what a failed attempt left, as far as the disk lets us."""
        with contextlib.suppress(OSError):
            self._clear_partial()

    def failure(self, step: int, reason: str) -> CheckpointError:
        """What to say when the checkpoint of ``step`` could not be written."""
        kept = self.steps()
        rest = f"{self.path(kept[-1])} is intact" if kept else "there is no earlier checkpoint"
        return CheckpointError(
            f"the checkpoint of step {step} cannot be written to {self.folder} ({reason}); {rest}; "
            "make room or mend the permissions and start the same command again"
        )

    # --- reading --------------------------------------------------------------------------------------------

    def newest(self, warn: Callable[[str], None], ranks: Ranks | None = None) -> tuple[Path, Record] | None:
        """The newest checkpoint whose checksums hold, or None if there is no checkpoint at all.

        All ranks come to the same answer: rank 0 looks what there is, and each compares a share of the
        checksums. Nothing is changed: whose run this is, the caller has yet to see. Then comes :meth:`adopt`.

        Args:
            warn: told about every checkpoint that is passed over.
            ranks: this process among those that ask together; None asks alone.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
        """
        ranks = ranks or Ranks()
        steps: list[int] = ranks.broadcast(self.steps() if ranks.main else None)
        problem = ""
        for step in reversed(steps):
            folder = self.path(step)
            values, problem = self._verified(folder, ranks)
            if not problem:
                return folder, record_of(values)
            warn(f"checkpoint of step {step} is unusable: {problem}; trying the one before")
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.folder} can be used, "
                f"the oldest because {problem}; "
                "restore one, or choose another out folder to start anew"
            )
        return None

    def _verified(self, folder: Path, ranks: Ranks) -> tuple[dict[str, Any], str]:
        """Values of a checkpoint's record and what is wrong with it, the same on every rank."""
        values: dict[str, Any] = {}
        problem = ""
        if ranks.main:
            try:
                values = read_values(folder)
            except CheckpointError as error:
                problem = str(error)
        values, problem = ranks.broadcast([values, problem])
        if problem:
            return values, problem
        load = [0] * ranks.world_size
        for name, expected in sorted(values["files"].items(), key=lambda item: -item[1]["bytes"]):
            owner = load.index(min(load))
            load[owner] += expected["bytes"]
            if owner == ranks.rank and not problem:
                try:
                    check_file(folder / name, expected)
                except CheckpointError as error:
                    problem = str(error)
        return values, next((told for told in ranks.gather(problem) if told), "")

    def adopt(self, record: Record, warn: Callable[[str], None]) -> None:
        """Make the checkpoint of ``record`` the newest one: the run goes on from there.

        Later checkpoints (they were passed over) are set aside under names that start with ``corrupt-``,
        the links are mended, and checkpoints that need not stay are removed.

        Args:
            record: of the checkpoint that :meth:`newest` found.
            warn: told when ``latest`` was not what it should be.

        Raises:
            TrainingError: the folder cannot be written.
        """
        step = record.progress.step
        best = record.progress.best_step if self.keep_best else -1
        try:
            # The link first: it may point at one that is set aside.
            self._mend_pointer(self.path(step), warn)
            self._set_aside(after=step)
            self._mend_best(best)
            self._prune(step, best)
        except OSError as error:
            raise self._unwritable(error) from error

    # --- removing -------------------------------------------------------------------------------------------

    def _prune(self, newest: int, best: int) -> None:
        """Remove what need not stay; each leaves its name first, so no half checkpoint has one."""
        others = [step for step in self.steps() if step != newest]
        for step in others[: -(self.keep - 1) or None]:
            if step == best or (self.milestone_every and step % self.milestone_every == 0):
                continue
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

    def _mend_best(self, best: int) -> None:
        """Point ``best`` at the best checkpoint there is, or remove a link that points at nothing."""
        if best in self.steps():
            if not self.best.is_symlink() or self.best.resolve() != self.path(best).resolve():
                point_at(self.best, self.path(best))
        elif self.best.is_symlink() and not self.best.exists():
            self.best.unlink()
