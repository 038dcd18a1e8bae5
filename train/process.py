"""One process of a run: alone, or one rank among several whose first error is told once and ends all of them.

``python -m spikelm.train`` and ``spikelm train`` come here on every rank, whatever launcher started them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from spikelm.errors import SpikeLMError
from spikelm.train.failures import (
    FAILURE,
    Failure,
    StoreLost,
    is_broken_collective,
    tell,
    tell_failure,
)
from spikelm.train.heartbeat import silence
from spikelm.train.watchdog import DAY, LONG, Watchdog

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig
    from spikelm.train.ranks import Ranks

_JOIN_TIMEOUT = 60.0  # seconds; where the configuration, which would say them, cannot be read


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a rank has to work with."""

    config: TrainConfig
    ranks: Ranks


def launched_ranks() -> int:
    """Number of processes that a launcher says it started; 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdigit() else 1


@contextlib.contextmanager
def membership(source: str, overrides: Sequence[str] = ()) -> Iterator[Member]:
    """Read the configuration, join the other ranks and watch over what is done inside.

    With one process, errors are raised as they are. With several, the process ends here when any rank fails:
    the failing rank says ``rank N: sentence``, rank 0 that it ended because of it, and all have the same exit
    code (2 for a SpikeLMError).

    Args:
        source: a training configuration: a file, or the name of a preset.
        overrides: ``key=value`` pairs.

    Raises:
        SpikeLMError: the configuration cannot be used (one process).
    """
    from spikelm.train.backend import choose_device
    from spikelm.train.config import TrainConfig
    from spikelm.train.ranks import Ranks, join

    config, refused = None, None
    try:
        config = TrainConfig.from_yaml(source, overrides)
        device = choose_device(config.device, Ranks.from_environment().local_rank)
    except SpikeLMError as error:
        if launched_ranks() == 1:
            raise
        # The others may have another file or machine; they are told like of any other error.
        refused, device = error, choose_device("cpu")
    timeout = _JOIN_TIMEOUT if config is None else config.timeout
    try:
        ranks = join(timeout, device, patience=DAY + LONG)
    except SpikeLMError as error:
        if launched_ranks() == 1:
            raise
        tell(f"rank {os.environ.get('RANK', '?')}: {refused or error}")
        _leave(SpikeLMError.exit_code)
    watchdog = Watchdog(ranks, timeout)
    ranks = replace(ranks, watchdog=watchdog)
    if ranks.world_size == 1:
        with watchdog:
            assert config is not None
            yield Member(config=config, ranks=ranks)
        return
    with watchdog, _ending_together(watchdog, ranks):
        if refused is not None or config is None:
            raise refused or AssertionError
        yield Member(config=config, ranks=ranks)
        ranks.leave()


@contextlib.contextmanager
def _ending_together(watchdog: Watchdog, ranks: Ranks) -> Iterator[None]:
    """Whatever ends this rank, it is one of the run's ranks that end for one reason."""
    failures = watchdog.failures
    assert failures is not None
    # Outside the training loop, which turns them into a checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _terminate)
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # The launcher ends the ranks that are left; they have something to say first, and end by themselves.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        watchdog.only_beat()
        failure = _reason(error, watchdog, ranks)
        if failure is None:  # the watchdog's thread has told it, or nobody can be reached any more
            _leave(FAILURE)
        if failure.seen_by == ranks.rank and failure.rank == ranks.rank and not _expected(error):
            traceback.print_exception(error)
        tell_failure(failure, ranks.rank)
        failures.leave(patience=10.0)
        _leave(failure.code)
    watchdog.finish()
    failures.leave(patience=60.0)


class Terminated(BaseException):
    """A signal that ends the process where it is: the training loop has not begun, or has ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


def _reason(error: BaseException, watchdog: Watchdog, ranks: Ranks) -> Failure | None:
    """The failure that ends the run, given what went wrong on this rank."""
    failures = watchdog.failures
    assert failures is not None
    rank = ranks.rank
    try:
        if is_broken_collective(error) or isinstance(error, Terminated):
            # Another rank's error, or its silence, is the cause (a launcher then ends the rest); it may be a
            # moment away.
            told = failures.wait_for_first(watchdog.interval)
            lost = None if told is not None else watchdog.lost_rank(5 * watchdog.interval)
            if told is None and lost is not None:
                told = failures.publish(
                    Failure(rank=lost[0], sentence=silence(lost[1], lost[2]), code=FAILURE, seen_by=rank)
                )
            told = told or failures.first()
            if told is not None:
                return told
        mine = Failure(rank=rank, sentence=_sentence(error), code=_code(error), seen_by=rank)
        at_fault = getattr(error, "rank", None)
        if at_fault not in (None, rank):  # all ranks raise this; the one it is about tells it
            told = failures.wait_for_first(2 * watchdog.interval)
            if told is not None:
                return told
        told = failures.publish(mine)
        return told if told == mine or told.seen_by != rank else None
    except StoreLost:
        if is_broken_collective(error):
            tell(
                f"rank {rank}: ended because the process that holds the run's store is gone "
                "(rank 0 or its launcher)"
            )
        else:
            tell(f"rank {rank}: {_sentence(error)}")
        return None


def _expected(error: BaseException) -> bool:
    return isinstance(error, (SpikeLMError, KeyboardInterrupt, Terminated))


def _sentence(error: BaseException) -> str:
    if isinstance(error, SpikeLMError):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Terminated):
        return f"ended by {error}"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _code(error: BaseException) -> int:
    if isinstance(error, SpikeLMError):
        return error.exit_code
    if isinstance(error, Terminated):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else FAILURE


def _leave(code: int) -> NoReturn:
    """End at once: the process group of a broken run may wait for its peers in its destructor."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
