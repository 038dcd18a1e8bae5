"""Which rank failed first, told through the store that all ranks reach, so that its error is what is read.

A rank that fails writes its sentence under one key before it ends; the first to write wins. The others find
it there, whether their collective broke or still waits, and end with one quiet line. The store works beside a
collective that hangs; every user of it here has a connection of its own (``clone``), because a blocked wait
holds the connection it uses.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

FAILURE = 1
"""Exit code of a rank that ended for a reason that is no SpikeLMError (a hang, a lost rank, a fault)."""

_KEY, _ENDED = "failure", "ended"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run of several ranks ends.

    Attributes:
        rank: the rank to blame.
        sentence: what happened to it.
        code: exit code of every rank of the run.
        seen_by: the rank that says so (another one where the blamed rank cannot speak).
    """

    rank: int
    sentence: str
    code: int
    seen_by: int

    def __str__(self) -> str:
        """The sentence for the terminal, as the rank that found out says it."""
        return f"rank {self.rank}: {self.sentence}"


class StoreLost(Exception):
    """The store does not answer: the process that held it (rank 0, or its launcher) has ended."""


class Failures:
    """The record of the first failure of a run.

    Args:
        store: the c10d store of the run; a connection of its own is opened.
        rank: of this process.
        world_size: ranks of the run.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store = store.clone()
        self.rank, self.world_size = rank, world_size

    def publish(self, failure: Failure) -> Failure:
        """Record a failure; the one that counts is returned: this one, or an earlier one of another rank.

        Raises:
            StoreLost: the store is gone.
        """
        try:
            told = self.store.compare_set(_KEY, "", json.dumps(asdict(failure)))
        except RuntimeError as error:
            raise StoreLost from error
        return Failure(**json.loads(told))

    def first(self) -> Failure | None:
        """The failure that ends the run, or None.

        Raises:
            StoreLost: the store is gone.
        """
        try:
            if not self.store.check([_KEY]):
                return None
            return Failure(**json.loads(self.store.get(_KEY)))
        except RuntimeError as error:
            raise StoreLost from error

    def wait_for_first(self, seconds: float) -> Failure | None:
        """The failure that ends the run; waits for it to be told.

        Raises:
            StoreLost: the store is gone.
        """
        until = time.monotonic() + seconds
        while (found := self.first()) is None and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def leave(self, patience: float) -> None:
        """Count this rank as ended; the rank that holds the store stays until the others have read it.

        Args:
            patience: seconds that the holder waits at most (a rank that was killed never leaves).
        """
        try:
            count = self.store.add(_ENDED, 1)
            if holds_store(self.rank):
                until = time.monotonic() + patience
                while count < self.world_size and time.monotonic() < until:
                    time.sleep(0.05)
                    count = self.store.add(_ENDED, 0)
        except RuntimeError:
            return  # the holder is gone, and this rank is leaving anyway


def holds_store(rank: int) -> bool:
    """Whether the store lives in this process: in rank 0, unless torchrun's agent holds it."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def tell(line: str) -> None:
    """One line on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def tell_failure(failure: Failure, rank: int) -> None:
    """The sentence from the rank that found out, and one line of rank 0 (of rank 1 where rank 0 failed)."""
    if failure.seen_by == rank:
        tell(str(failure))
    elif rank == 0 or (rank == 1 and failure.rank == 0):
        time.sleep(0.3)  # the error itself comes first
        tell(f"rank {rank}: ended because rank {failure.rank} failed: {failure.sentence}")


def is_broken_collective(error: BaseException) -> bool:
    """Whether an exception says that another rank did not take part, so that the cause lies elsewhere."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return any(
        mark in text for mark in ("gloo/", "[Rank ", "NCCL", "Connection closed by peer", "ProcessGroup")
    )
