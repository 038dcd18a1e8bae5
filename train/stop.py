"""Ctrl-C, SIGTERM and SIGUSR1 as a wish, granted after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Ctrl-C; what job schedulers send before they kill; what they send some time before the limit (Slurm)."""


class StopSignals:
    """While entered, the first of :data:`SIGNALS` is remembered; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, nothing is caught.

    Attributes:
        received: name of the signal, for example ``"SIGINT"``, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
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
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
