"""What does `spikelm convert spike` cost in bits per byte, and what does its search gain?

Trains continuous twins (RWKV-4 mixing; SpikingBrain's hybrid of gated linear attention and windows) for a few
minutes on text that is in every Python, converts each to integer spikes and int8 weights, with thresholds
searched and with one k for all, measures both on the same held-out text, and sweeps k. One seed a model: an
example of what the command gives, no law.

    .venv/bin/python benchmarks/convert_spike.py [--steps 240] [--models spikegpt-nano-twin ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _record import record

MODELS = ("spikegpt-nano-twin", "spikingbrain-nano-twin")
TRAIN, HELD_OUT = "builtin:python-docs#train", "builtin:python-docs#valid"
SWEEP = "1,2,2.5,3,3.5,4"


def spikelm(*words: str) -> None:
    """Run the program; its output goes to this one's."""
    subprocess.run([sys.executable, "-m", "spikelm", *words], check=True, env=dict(os.environ))


def convert(twin: Path, out: Path, *words: str) -> dict[str, Any]:
    """One conversion's result, as the command writes it, and its wall seconds."""
    given = ["--calibrate", TRAIN, "--eval", HELD_OUT, "--samples", "32", "--length", "256"]
    result = out.with_suffix(".json")
    started = time.perf_counter()
    spikelm(
        "convert", "spike", str(twin), str(out), *given, "--max-bytes", "40000", "--json", str(result), *words
    )
    found: dict[str, Any] = json.loads(result.read_text())
    for name in ("source", "checkpoint"):  # temporary folders
        found.pop(name, None)
    return {"seconds": time.perf_counter() - started, **without(found, ("projections", "config"))}


def without(value: Any, names: tuple[str, ...]) -> Any:
    """A JSON value without the mappings called ``names``: figures of every projection are in the report."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (k in names and isinstance(v, dict))}
        return {k: without(v, names) for k, v in kept.items()}
    return [without(entry, names) for entry in value] if isinstance(value, list) else value


def measure(model: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train a twin, convert it, sweep k."""
    twin = folder / model
    spikelm("train", "nano-sd", f"model={model}", f"out={twin}", f"steps={steps}")
    words = ("--k", "3", "--coding", "bidirectional")
    return {
        "steps": steps,
        "k=3": convert(twin, folder / f"{model}-spiking", *words),
        "sweep": convert(twin, folder / f"{model}-sweep", "--sweep", SWEEP),
    }


def main() -> int:
    """Run, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {model: measure(model, args.steps, Path(folder)) for model in args.models}
    if not args.no_record:
        print(record("convert_spike", figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
