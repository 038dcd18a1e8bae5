"""How good and how fast is `spikelm demo`, from nothing?

Runs the command in an empty folder with an empty cache and records its figures. Goals: both models below
2.2 bits per byte on the held-out text (and below zlib -9 on the same bytes), in eight minutes on two cores.

    .venv/bin/python benchmarks/demo.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _record import record

GOAL_BITS_PER_BYTE = 2.2
GOAL_SECONDS = 8 * 60


def run(folder: Path, words: list[str]) -> tuple[dict[str, Any], str, float]:
    """One demo: its report, what it printed, and wall seconds."""
    environment = {**os.environ, "SPIKELM_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "spikelm", "demo", "--out", str(folder / "demo"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - started
    return json.loads((folder / "demo" / "demo.json").read_text()), done.stdout, seconds


def main() -> int:
    """Run, print, record; 1 if a goal was missed."""
    with tempfile.TemporaryDirectory() as folder:
        report, shown, seconds = run(Path(folder), sys.argv[1:])
    print(shown)
    models = {}
    for name, entry in report["models"].items():
        total, held_out = entry["spikes"]["total"], entry["held_out"]
        models[name] = {
            "bits_per_byte": held_out["bits_per_byte"],
            "stderr_bits_per_byte": held_out["stderr_bits_per_byte"],
            "label": held_out["label"],
            "parameters": entry["parameters"],
            "silent_inputs": total["silent"],
            "mean_count": total["mean_count"],
            "spiking_share_of_macs": total["spiking_share"],
            "training_tokens_per_second": entry["tokens_per_second"],
            "training_seconds": entry["training_seconds"],
            "state_bytes": entry["state_bytes"],
        }
    bits = [entry["bits_per_byte"] for entry in models.values()]
    zlib = report["compressors"]["zlib -9"]
    goals = {
        f"both below {GOAL_BITS_PER_BYTE} bits per byte": max(bits) < GOAL_BITS_PER_BYTE,
        "both below zlib -9 on the same bytes": max(bits) < zlib,
        "within eight minutes": seconds <= GOAL_SECONDS,
    }
    figures = {
        "seconds": seconds,
        "models": models,
        "compressors_bits_per_byte": report["compressors"],
        "held_out_bytes": report["held_out_bytes"],
        "precision": report["precision"],
        "cost_of_spiking": models["spiking"]["bits_per_byte"] / models["twin"]["bits_per_byte"] - 1,
        "sample": report["sample"],
        "goals": goals,
    }
    print(f"{seconds:.0f} s in all; {goals}\n{record('demo', figures)}")
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
