"""Write a benchmark's figures beside the machine, the versions and the date they were measured with."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from spikelm.provenance import git_revision, versions

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    """Name of the processor as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions, revision and date."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "versions": versions(),
        "git_revision": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def record(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` and return its path.

    Args:
        name: file name without its suffix, for example ``"train_step"``.
        figures: what was measured; JSON values only.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2, allow_nan=False) + "\n")
    return path
