"""No progress is an end: which rank hangs, in which step and phase, for how long, and its Python stacks.

    watchdog = Watchdog(ranks, timeout=600.0)
    with watchdog:                                  # starts a thread
        with watchdog.phase("forward"):
            ...
        with watchdog.phase("checkpoint", allowance=3600.0):
            ...
        watchdog.beat(step)

Every rank has a thread that writes a heartbeat (step, phase, seconds without progress) into the store of the
run, beside whatever the main thread hangs in. Entering and leaving a phase and :meth:`Watchdog.beat` are
progress. A rank that works has ``timeout`` seconds, or the allowance of its phase where that is longer, then
it says what it does, prints its stacks and ends. A rank that waits in a collective for others is innocent as
long as one of them works: it speaks only where a rank no longer writes heartbeats (stopped, killed, its
machine gone), or where all ranks wait, each for another. So the culprit is named, not its victims.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from spikelm.train.failures import FAILURE, Failure, Failures, StoreLost, tell, tell_failure
from spikelm.train.heartbeat import NEVER_HEARD, Beat, Seen, born, kill, silence

if TYPE_CHECKING:
    from spikelm.train.ranks import Ranks

# Where the innermost Python frame lies in one of these, the thread waits for other ranks (autograd's engine
# calls the collectives of DistributedDataParallel from C++).
LONG = 2 * 3600.0
"""Allowance, seconds, of what may take long and says nothing meanwhile: a checkpoint, compiling kernels."""

DAY = 24 * 3600.0
"""Allowance of turning a large text into tokens."""

_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "deepspeed/comm/", "spikelm/train/ranks.py")


class Phases(Protocol):
    """What a run tells about its progress."""

    def phase(
        self, name: str, *, allowance: float = 0.0, waits: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """What the program does while entered."""

    def beat(self, step: int | None = None) -> None:
        """Progress."""


class Unwatched:
    """Nobody watches: a trainer in somebody else's program must not end it."""

    def phase(
        self, name: str, *, allowance: float = 0.0, waits: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Nothing to tell."""
        return contextlib.nullcontext()

    def beat(self, step: int | None = None) -> None:
        """Nothing to tell."""


class Watchdog:
    """Watches this process and, through the store, the others.

    Args:
        ranks: the ranks of the run. With one rank, a lack of progress is only reported: nobody waits for it.
        timeout: seconds without progress that end the run.

    Attributes:
        failures: the run's record of its first failure, None for one rank.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(2.0, max(0.1, timeout / 20))
        self._rank, self._world = ranks.rank, ranks.world_size
        self.failures = None if ranks.store is None else Failures(ranks.store, ranks.rank, ranks.world_size)
        self._grace = max(2.0, 5 * self.interval)
        self._phases: list[tuple[str, float, bool]] = [("start", timeout, False)]
        self._moved = time.monotonic()
        self._step = 0
        self._number = 0
        self._seen: Seen = {}
        self._reported = False
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._concluding = False
        self._thread: threading.Thread | None = None
        self._born = born()
        self._parent = os.getppid() if _launched() else None

    def __enter__(self) -> Watchdog:
        self._moved = time.monotonic()
        with contextlib.suppress(StoreLost):
            self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """End the thread; a last heartbeat says that this rank has nothing more to do."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        with contextlib.suppress(StoreLost):
            self._write(done=True)

    def only_beat(self) -> None:
        """Leave it to the main thread to say why the run ends; the others must still see that it lives."""
        self._concluding = True

    # --- what the main thread tells -------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str, *, allowance: float = 0.0, waits: bool = False) -> Iterator[None]:
        """What the program does while entered.

        Args:
            name: for messages: ``"forward"``, ``"all-reduce"``, ``"checkpoint"``.
            allowance: seconds without progress that are normal here, where they are more than the timeout.
            waits: nothing but waiting for other ranks happens here.
        """
        self._phases.append((name, max(self.timeout, allowance), waits))
        self._moved = time.monotonic()
        try:
            yield
        finally:
            self._phases.pop()
            self._moved = time.monotonic()

    def beat(self, step: int | None = None) -> None:
        """Progress: a step was done, or a part of a long phase."""
        if step is not None:
            self._step = step
            self._phases[0] = ("between steps", self.timeout, False)
        self._moved = time.monotonic()

    # --- the thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        lost_since: float | None = None
        while not self._stop.wait(self.interval):
            try:
                beat = self._write()
                if self._concluding:
                    continue
                self._look(beat)
                lost_since = None
            except StoreLost:
                # Once is a hiccup; a store that stays away died with the process that held it.
                lost_since = lost_since or time.monotonic()
                gone = time.monotonic() - lost_since > self._grace
                if gone and not self._concluding and not self._stop.is_set():
                    self._end_without_store()
            self._follow_launcher()

    def _write(self, done: bool = False) -> Beat:
        """This rank's heartbeat, told to the others."""
        phase, limit, declared = self._phases[-1]
        age = time.monotonic() - self._moved
        self._number += 1
        beat = Beat(
            number=self._number,
            step=self._step,
            phase=phase,
            age=age,
            waits=declared or self._in_collective(),
            left=limit - age,
            host=socket.gethostname(),
            pid=os.getpid(),
            born=self._born,
            done=done,
        )
        if self.failures is not None:
            try:
                self.failures.store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))
            except RuntimeError as error:
                raise StoreLost from error
        return beat

    def _look(self, mine: Beat) -> None:
        """End this process if another failed, or if it is time to say that somebody hangs."""
        if self.failures is None:
            if mine.left <= 0 and not self._reported:
                self._reported = True
                tell(f"warning: {self._described(mine)}; Python stacks follow")
                _dump_stacks()
            self._reported = self._reported and mine.left <= 0
            return
        failure = self.failures.first()
        if failure is not None and failure.seen_by != self._rank:
            self._end(failure)
        if mine.age < 3 * self.interval:
            self._seen.clear()
            return
        # The main thread has stood still for a while, so the others may matter; a running rank never asks.
        now = time.monotonic()
        others = self._others(self._seen, now)
        patience = self.timeout - 4 * self.interval
        silent = [rank for rank, (beat, seen) in others.items() if not beat.done and now - seen > patience]
        if silent:
            beat, seen = others[silent[0]]
            self._fail(silence(beat, now - seen), victim=(silent[0], beat))
        if mine.left > 0:  # heartbeats come from a thread, whatever a phase is allowed; progress does not
            return
        busy = [beat for beat, _ in others.values() if not beat.waits and not beat.done and beat.left > 0]
        if mine.waits and busy:
            return
        older = [b for b, _ in others.values() if not b.waits and not b.done and b.age > mine.age + 1.0]
        if (mine.waits or older) and mine.left > -self._grace:
            return
        reason = "" if not mine.waits else ", where it waits for the others" + self._where(others)
        self._fail(f"{self._described(mine)}{reason}")

    def _others(self, seen: Seen, now: float) -> Seen:
        """The other ranks' last heartbeats; ``seen`` is what was known, and is brought up to date."""
        assert self.failures is not None
        store = self.failures.store
        ranks = [rank for rank in range(self._world) if rank != self._rank]
        try:
            told = [store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else None for rank in ranks]
        except RuntimeError as error:
            raise StoreLost from error
        for rank, value in zip(ranks, told, strict=True):
            beat = NEVER_HEARD if value is None else Beat(**json.loads(value))
            if rank not in seen or seen[rank][0].number != beat.number:
                seen[rank] = beat, now
        return seen

    def lost_rank(self, seconds: float) -> tuple[int, Beat, float] | None:
        """A rank without a heartbeat for ``seconds`` (its last one, and how long ago), once that is certain.

        Raises:
            StoreLost: the store is gone.
        """
        seen: Seen = {}
        until = time.monotonic() + seconds + self.interval
        while True:
            now = time.monotonic()
            others = self._others(seen, now)
            lost = [rank for rank, (beat, at) in others.items() if not beat.done and now - at >= seconds]
            if lost:
                beat, at = others[lost[0]]
                return lost[0], beat, now - at
            if now > until:
                return None
            time.sleep(self.interval / 4)

    # --- the end --------------------------------------------------------------------------------------------

    def _fail(self, sentence: str, *, victim: tuple[int, Beat] | None = None) -> None:
        """Record why the run ends, unless another rank was first, and end this process.

        Args:
            sentence: what happened to this rank, or to the victim.
            victim: another rank that cannot speak for itself, and its last heartbeat.
        """
        assert self.failures is not None
        rank = self._rank if victim is None else victim[0]
        mine = Failure(rank=rank, sentence=sentence, code=FAILURE, seen_by=self._rank)
        failure = self.failures.publish(mine)
        if victim is not None:
            kill(victim[1])
        elif failure == mine:
            tell(f"{failure}; its Python stacks:")
            _dump_stacks()
            self._exit(failure.code)
        self._end(failure)

    def _end(self, failure: Failure) -> None:
        tell_failure(failure, self._rank)
        self._exit(failure.code)

    def _end_without_store(self) -> None:
        if self._rank <= 1:
            tell(
                f"rank {self._rank}: ended because the process that holds the run's store is gone "
                "(rank 0 or its launcher)"
            )
        self._exit(FAILURE)

    def _exit(self, code: int) -> None:
        """End the process from this thread: the main thread may never come back."""
        if self.failures is not None:
            self.failures.leave(patience=self._grace)
        sys.stdout.flush()
        os._exit(code)

    def _follow_launcher(self) -> None:
        """A launcher that is gone can stop nobody: its ranks stop themselves, with a checkpoint."""
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            if self._rank == 0:
                tell("rank 0: the launcher is gone; stopping")
            os.kill(os.getpid(), signal.SIGTERM)

    def _described(self, beat: Beat) -> str:
        return f"no progress for {beat.age:.0f} s in step {beat.step + 1}, phase {beat.phase}"

    def _where(self, others: Seen) -> str:
        places = [
            f"rank {rank} is in {beat.phase} of step {beat.step + 1}" for rank, (beat, _) in others.items()
        ]
        return f" ({', '.join(places[:4])})" if places else ""

    def _in_collective(self) -> bool:
        """Whether the main thread waits for other ranks, seen from its innermost Python frame."""
        if self._world == 1 or self._main is None:
            return False
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return False
        path = frame.f_code.co_filename.replace(os.sep, "/")
        return any(part in path for part in _WAITING)


def _launched() -> bool:
    """Whether torchrun or deepspeed started this process: only then does the parent's end mean anything."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


def _dump_stacks() -> None:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a standard error without a descriptor
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
