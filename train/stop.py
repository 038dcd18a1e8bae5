"""Ctrl-C, SIGTERM and SIGUSR1 as a wish, granted after the current step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Ctrl-C; what job schedulers send before they kill; what they send some time before the limit (Slurm)."""


ONE_WISH = 3.0
"""Seconds in which further signals are taken for the first one."""


class StopSignals:
    """While entered, the first of :data:`SIGNALS` is remembered; a later one acts as usual.

    The same wish may come twice at once, from a scheduler that signals every process of a job and from a
    launcher that passes its own on, so that for :data:`ONE_WISH` seconds nothing else happens.

    Outside the main thread, where Python allows no handlers, nothing is caught.

    Attributes:
        received: name of the signal, for example ``"SIGINT"``, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.Signals[name] for name in SIGNALS):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > ONE_WISH:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
