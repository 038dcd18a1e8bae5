"""Memory that a rank uses, and the largest use among the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process uses.

    Returns:
        ``rss`` (resident now) and ``rss_peak`` (most since the process began); on a GPU also
        ``cuda_allocated`` (tensors), ``cuda_reserved`` (held by torch's allocator) and ``cuda_peak`` (most
        that was ever allocated).
    """
    found = _resident()
    if device.type == "cuda":
        found |= {
            "cuda_allocated": torch.cuda.memory_allocated(device),
            "cuda_reserved": torch.cuda.memory_reserved(device),
            "cuda_peak": torch.cuda.max_memory_allocated(device),
        }
    return found


def largest(told: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Per figure the largest of all ranks."""
    found: dict[str, int] = {}
    for figures in told:
        for name, value in figures.items():
            found[name] = max(value, found.get(name, 0))
    return found


def _resident() -> dict[str, int]:
    try:
        text = _STATUS.read_text()
    except OSError:
        return _resident_elsewhere()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    kilobytes = {key: int(lines[key].split()[0]) for key in ("VmRSS", "VmHWM") if key in lines}
    now = 1024 * kilobytes.get("VmRSS", 0)
    return {"rss": now, "rss_peak": max(now, 1024 * kilobytes.get("VmHWM", 0))}


def _resident_elsewhere() -> dict[str, int]:
    """Systems without /proc tell the peak alone, macOS in bytes and others in kilobytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"rss": peak, "rss_peak": peak}
