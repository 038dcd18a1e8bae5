"""Writes a checkpoint in the background, on all ranks at once.

Every rank has a thread that writes its files into the shared folder of the attempt and leaves a report there
(sizes and checksums, or why it failed). Rank 0's thread waits for the reports, then makes the whole a
checkpoint. Threads meet in the folder only: collectives belong to the main threads, which agree between
steps how a write ended.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikelm.errors import CheckpointError, SpikeLMError
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.files import Seal, replace_text, seal, sync_folder, why
from spikelm.train.ranks import Ranks
from spikelm.train.shards import write_safetensors
from spikelm.train.snapshot import Contents
from spikelm.train.training_state import Record

_PAUSE = 0.02
"""Seconds between two looks for reports."""

EXPECTED = (OSError, SpikeLMError)
"""Failures that a user can mend; anything else is a fault of the program and keeps its traceback."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a finished write amounted to.

    Attributes:
        bytes, files: of all ranks together.
        seconds: from the snapshot to the end.
    """

    bytes: int
    files: int
    seconds: float


class Write:
    """One checkpoint being written.

    Args:
        store: where to.
        ranks: this process among those that write.
        attempt: name that rank 0 gave this attempt; its folder exists.
        record: written by rank 0 at the end.
        contents: this rank's tensors; they must not change until the write is over.
        rest: rank 0 lets it write the other files into the folder; it returns the names of those that need
            no checksum.

    Attributes:
        error: why it failed on this rank, or None; fixed once :attr:`over`.
        written: what it amounted to; on rank 0 after success.
    """

    def __init__(
        self,
        store: CheckpointStore,
        ranks: Ranks,
        attempt: str,
        record: Record,
        contents: Contents,
        rest: Callable[[Path], set[str]],
    ) -> None:
        self.step = record.progress.step
        self.error: BaseException | None = None
        self.elsewhere = False
        """Whether the error is another rank's."""
        self.written: Written | None = None
        self._store, self._ranks, self._attempt = store, ranks, attempt
        self._record, self._contents, self._rest = record, contents, rest
        self._over = threading.Event()
        self._deadline = float("inf")
        self._started = time.perf_counter()
        # Not a daemon: the interpreter waits for it before it ends.
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{self.step}", daemon=False)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether this rank's part has ended, well or not (rank 0's part is the whole)."""
        return self._over.is_set()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it is over, or for some time."""
        self._over.wait(seconds)

    def end(self, patience: float) -> None:
        """Wait until it is over; other ranks' reports are waited for ``patience`` seconds at most."""
        self._deadline = time.perf_counter() + patience
        self._thread.join()

    # --- in the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            files = self._write_mine()
            if self._ranks.main:
                self._commit(files)
            else:
                self._report({"files": {name: asdict(found) for name, found in files.items()}})
        except BaseException as error:
            self.error = error
            if self._ranks.main and isinstance(error, EXPECTED):
                self._store.give_up()
        finally:
            self._over.set()

    def _write_mine(self) -> dict[str, Seal]:
        try:
            content = self._folder / "content"
            files = {
                name: write_safetensors(content / name, tensors)
                for name, tensors in self._contents.files.items()
            }
            if self._ranks.main:
                before = set(content.iterdir())
                unsealed = self._rest(content)
                for path in sorted(set(content.iterdir()) - before):
                    found = seal(path)
                    if path.name not in unsealed:
                        files[path.name] = found
            return files
        except EXPECTED as error:
            if not self._ranks.main:
                self._report({"error": reason(error)})
            raise

    def _report(self, values: dict[str, Any]) -> None:
        replace_text(self._report_of(self._ranks.rank), json.dumps(values))

    def _commit(self, files: dict[str, Seal]) -> None:
        for rank in range(1, self._ranks.world_size):
            files |= self._reported(rank)
        content = self._folder / "content"
        sync_folder(content)
        self._store.commit(self._attempt, self._record, files)
        self.written = Written(
            bytes=sum(found.bytes for found in files.values()),
            files=len(files),
            seconds=time.perf_counter() - self._started,
        )

    def _reported(self, rank: int) -> dict[str, Seal]:
        """What another rank wrote, once it says so."""
        path = self._report_of(rank)
        while not path.exists():
            if time.perf_counter() > self._deadline:
                self.elsewhere = True
                raise CheckpointError(f"rank {rank} did not finish its part")
            time.sleep(_PAUSE)
        told = json.loads(path.read_text(encoding="utf-8"))
        if "error" in told:
            self.elsewhere = True
            raise CheckpointError(f"rank {rank}: {told['error']}")
        files = {name: Seal(**values) for name, values in told["files"].items()}
        for name, expected in files.items():
            file = self._folder / "content" / name
            if not file.is_file() or file.stat().st_size != expected.bytes:
                raise CheckpointError(f"rank {rank} wrote {name}, and rank 0 does not see it so")
        return files

    @property
    def _folder(self) -> Path:
        return self._store.partial(self._attempt)

    def _report_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"


def reason(error: BaseException) -> str:
    """Why a write failed, in words."""
    if isinstance(error, OSError):
        return why(error)
    return str(error) if isinstance(error, SpikeLMError) else f"{type(error).__name__}: {error}"
