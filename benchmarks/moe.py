"""Does a grouped product of all experts pay on this device, beside calling the experts one by one?

    python benchmarks/moe.py [--device cuda] [--rounds 7]

Writes results/moe.json: for each shape the ratio of the median times, grouped over one by one, of the whole
channel with adaptive neurons. The two forms take turns, so that a busy machine is busy for both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest.mock import patch

import torch
from _record import record

from spikelm.bench.limits import wait
from spikelm.block import build_child
from spikelm.channels import experts
from spikelm.config import ModelConfig
from spikelm.recurrence import Part

SHAPES: dict[str, dict[str, Any]] = {
    "training, 512 tokens, 64 experts of 256 x 128, top 6": {
        "tokens": 512,
        "training": True,
        "options": {"experts": 64, "hidden": 128, "top_k": 6},
    },
    "training, 512 tokens, 8 experts of 256 x 512, top 2": {
        "tokens": 512,
        "training": True,
        "options": {"experts": 8, "hidden": 512, "top_k": 2},
    },
    "training, 4096 tokens, 64 experts of 256 x 128, top 6": {
        "tokens": 4096,
        "training": True,
        "options": {"experts": 64, "hidden": 128, "top_k": 6},
    },
    "one token, 64 experts of 256 x 128, top 6": {
        "tokens": 1,
        "training": False,
        "options": {"experts": 64, "hidden": 128, "top_k": 6},
    },
}


def seconds(part: Part, x: torch.Tensor, training: bool, grouped: bool) -> float:
    """One call, with backward where training."""
    repeats = 1 if training else 20
    with patch.object(experts, "worthwhile", lambda *_: grouped), torch.set_grad_enabled(training):
        wait(x.device)
        started = time.perf_counter()
        for _ in range(repeats):
            y, _ = part(x, None)
            if training:
                y.square().mean().backward()
                part.zero_grad(set_to_none=True)
        wait(x.device)
    return (time.perf_counter() - started) / repeats


def measure(shape: dict[str, Any], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of both forms."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=256, num_hidden_layers=1, neuron={"name": "adaptive"})
    part = build_child(config, 0, "", "channel", "channel", {"name": "moe", **shape["options"]}).to(device)
    x = torch.randn(1, shape["tokens"], 256, device=device, requires_grad=shape["training"])
    times: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(rounds + 1):
        for grouped in (True, False) if round_ % 2 else (False, True):
            found = seconds(part, x, shape["training"], grouped)
            if round_ > 0:
                times[grouped].append(found)
    together, alone = statistics.median(times[True]), statistics.median(times[False])
    return {"grouped_seconds": together, "one_by_one_seconds": alone, "ratio": together / alone}


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = {name: measure(shape, torch.device(args.device), args.rounds) for name, shape in SHAPES.items()}
    for name, row in figures.items():
        print(f"{name}: {row['ratio']:.2f} of {1e3 * row['one_by_one_seconds']:.1f} ms")
    print(record("moe", {"rounds": args.rounds, **figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
