"""What a rank tells the others of itself, and what is made of its silence."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank last told.

    Attributes:
        number: counts the heartbeats.
        step: optimiser steps done.
        phase: what it does.
        age: seconds without progress.
        waits: in a collective, for others.
        left: seconds until its own watchdog ends it.
        host, pid, born: its process; ``born`` tells it from a later one with the same number.
        done: it has nothing more to do.
    """

    number: int
    step: int
    phase: str
    age: float
    waits: bool
    left: float
    host: str
    pid: int
    born: float
    done: bool = False


NEVER_HEARD = Beat(
    number=0,
    step=0,
    phase="start",
    age=0.0,
    waits=False,
    left=0.0,
    host="an unknown machine",
    pid=0,
    born=0.0,
)

Seen = dict[int, tuple[Beat, float]]
"""The last heartbeat of each rank, and when it was first seen by this machine's clock (clocks differ)."""


def silence(beat: Beat, seconds: float) -> str:
    """Sentence about a rank whose heartbeats stopped."""
    return (
        f"no sign of life for {seconds:.0f} s (process {beat.pid} on {beat.host}; last heard in step "
        f"{beat.step + 1}, phase {beat.phase}): it was stopped or killed, or its machine is gone"
    )


def kill(beat: Beat) -> None:
    """End a silent process of this machine, which cannot end itself (a stopped one catches nothing)."""
    if beat.host != socket.gethostname():
        return
    with contextlib.suppress(OSError):
        if born(beat.pid) == beat.born:
            os.kill(beat.pid, signal.SIGKILL)


def born(pid: int | None = None) -> float:
    """When a process began; 0 if there is no such process."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0
