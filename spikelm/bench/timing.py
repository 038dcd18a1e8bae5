"""Timing calls in turns, so that a busy moment of the machine falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def summary(taken: list[tuple[float, float]]) -> dict[str, float]:
    """Median and best milliseconds of (wall, processor) seconds.

    The processor's time disturbs less what other programs do.
    """
    wall = [seconds for seconds, _ in taken]
    return {
        "median_ms": round(1e3 * statistics.median(wall), 4),
        "best_ms": round(1e3 * min(wall), 4),
        "cpu_median_ms": round(1e3 * statistics.median(cpu for _, cpu in taken), 4),
        "repeats": len(taken),
    }


def alternate(
    calls: Mapping[str, Call],
    repeats: int,
    few: Mapping[str, int] | None = None,
    seconds: float | None = None,
) -> dict[str, dict[str, float]]:
    """Time every call in turns.

    Args:
        calls: name -> what to time; each runs once before, which compiles, allocates and warms caches.
        repeats: times each is timed.
        few: name -> a smaller number for slow ones.
        seconds: stop early once this much time has passed (never before three rounds).
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    for i in range(repeats):
        if seconds is not None and i >= 3 and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            if i >= (few or {}).get(name, repeats):
                continue
            _wait()
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            _wait()
            taken[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return {name: summary(times) for name, times in taken.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
