"""What a figure must carry: the machine, the versions and the date it was measured with."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from spikelm.provenance import git_revision, versions


def cpu_model() -> str:
    """Name of the processor as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def vector_units() -> list[str]:
    """Vector extensions of the processor that decide its speed, as Linux names them."""
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "amx_int8",
        "asimd",
        "asimddp",
        "sve",
    )
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    found = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return [flag for flag in wanted if flag in found]


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions, revision and date."""
    return {
        "cpu": cpu_model(),
        "vector_units": vector_units(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "versions": versions(),
        "git_revision": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def document(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures (JSON values) beside the machine that gave them."""
    return {"machine": machine(), "figures": figures}
