"""How fast are int8 products of one token, dense and event-driven, beside what memory can give?

    python benchmarks/int8_gemv.py [--layers 12] [--width 512] [--seconds 4]

The matrices are those of the 46M preset's blocks (per layer five of D x D, one D x 4D, one 4D x D), read one
after the other on one thread, so that nothing stays in a small cache. The limit is how fast the same thread
reads as many bytes from huge pages in the same run. Writes results/int8_gemv.json: GB/s of the dense form and
its share of that limit; for graded counts and for binary spikes the speed of the event-driven form over the
dense one at every silent share; and the smallest share from which it is never slower, which
spikelm.weights.EVENT_DRIVEN_FROM must not be below.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _record import record
from torch import Tensor

from spikelm.bench.limits import read_bandwidth
from spikelm.kernels.int8_linear import c
from spikelm.kernels.int8_linear.packing import LAYOUTS, PackedInt8, packed_bytes
from spikelm.kernels.memory import Arena, aligned
from spikelm.weights import EVENT_DRIVEN_FROM, GROUP_SIZE

SHARES = (0.0, 0.3, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
KINDS = ("graded", "binary")
PATTERNS = 8
"""Different inputs of each width, so that what fires is not learnt by heart."""


class Stack:
    """All matrices of a model in one layout, and their products with inputs of several kinds."""

    def __init__(self, shapes: list[tuple[int, int]], layout: str) -> None:
        arena = Arena(sum(aligned(packed_bytes(*shape, GROUP_SIZE, layout)) for shape in shapes))
        self.matrices = []
        for outputs, inputs in shapes:
            weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
            scales = torch.rand(outputs, -(-inputs // GROUP_SIZE))
            self.matrices.append(PackedInt8(weight, scales, GROUP_SIZE, layout, arena))
        library = c.library()
        self.scratch = torch.empty(
            max(library.int8_scratch_bytes(packed._struct, 1, 1) for packed in self.matrices),
            dtype=torch.uint8,
        )
        self.y = torch.empty(max(outputs for outputs, _ in shapes))

    def seconds(self, counts: dict[int, list[Tensor]]) -> float:
        """One pass over all matrices."""
        call = c.library().int8_rows
        y, scratch = self.y.data_ptr(), self.scratch.data_ptr()
        calls = [
            (packed._struct, counts[packed.inputs][i % PATTERNS].data_ptr())
            for i, packed in enumerate(self.matrices)
        ]
        start = time.perf_counter()
        for packed, given in calls:
            call(packed, given, 1, None, None, y, scratch, 1)
        return time.perf_counter() - start


def inputs(kind: str, silent: float, widths: set[int]) -> dict[int, list[Tensor]]:
    """Counts of a kind, this share of them silent."""
    found: dict[int, list[Tensor]] = {}
    for width in sorted(widths):
        for _ in range(PATTERNS):
            counts = torch.ones(width)
            if kind == "graded":
                counts = torch.randn(width).mul(4).round().clamp(-127, 127)
                counts[counts == 0] = 1
            counts = counts * (torch.rand(width) >= silent)
            found.setdefault(width, []).append(counts.to(torch.int8))
    return found


def measure(layers: int, width: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes = ([(width, width)] * 5 + [(4 * width, width), (width, 4 * width)]) * layers
    size = sum(outputs * inputs for outputs, inputs in shapes)
    stacks = {layout: Stack(shapes, layout) for layout in LAYOUTS}
    cases = {(kind, share): inputs(kind, share, {width, 4 * width}) for kind in KINDS for share in SHARES}
    best: dict[tuple[str, str, float], float] = {}
    limit = 0.0
    end = time.perf_counter() + seconds * len(cases)
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        rounds += 1
        limit = max(limit, read_bandwidth(size, seconds=0.1))
        # In turns, so that a busy moment hits all alike; the least of many is what the machine can do.
        for (kind, share), counts in cases.items():
            for layout, stack in stacks.items():
                key = (layout, kind, share)
                best[key] = min(best.get(key, float("inf")), stack.seconds(counts))
    figures: dict[str, Any] = {"weights": size, "limit_gb_per_s": limit / 1e9, "rounds": rounds}
    for kind in KINDS:
        dense = min(best["out_in", kind, share] for share in SHARES)
        times = {share: dense / best["in_out", kind, share] for share in SHARES}
        slower = [share for share in SHARES if times[share] < 1]
        figures[kind] = {
            "dense_gb_per_s": size / dense / 1e9,
            "dense_share_of_limit": size / dense / limit,
            "event_driven_times_dense": {f"{share:g}": round(value, 3) for share, value in times.items()},
            "never_slower_from": next((share for share in SHARES if share > max(slower, default=-1)), None),
        }
    figures["event_driven_from"] = EVENT_DRIVEN_FROM
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=4.0, help="per kind and silent share")
    options = parser.parse_args()
    figures = measure(options.layers, options.width, options.seconds)
    print(f"read {figures['limit_gb_per_s']:.1f} GB/s, {figures['weights']:,} weights")
    for kind in KINDS:
        found = figures[kind]
        share = found["dense_share_of_limit"]
        print(f"{kind}: dense {found['dense_gb_per_s']:.1f} GB/s ({share:.0%} of the limit)")
        print("  " + ", ".join(f"{s}: {v:.2f}x" for s, v in found["event_driven_times_dense"].items()))
        print(f"  never slower from {found['never_slower_from']}; EVENT_DRIVEN_FROM is {EVENT_DRIVEN_FROM}")
    print(record("int8_gemv", figures))


if __name__ == "__main__":
    main()
