"""Write a benchmark's figures beside the machine, the versions and the date they were measured with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikelm.bench.record import document, machine

__all__ = ["machine", "record"]

RESULTS = Path(__file__).resolve().parent / "results"


def record(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` and return its path.

    Args:
        name: file name without its suffix, for example ``"gla"``.
        figures: what was measured; JSON values only.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document(figures), indent=2, allow_nan=False) + "\n")
    return path
