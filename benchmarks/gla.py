"""How fast is every form of gated linear attention, beside a matrix product of equal flops?

    python benchmarks/gla.py [--device cuda] [--repeats 10]

Writes results/gla.json: for each shape and gate the median milliseconds of forward, and of forward and
backward, of every form the device has; the time a square matrix product of as many floating-point operations
takes in the same run; and that time's share of each form's (the C form's chunks are shorter than those that
the operations are counted for, so its share may pass 1).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _record import record
from torch import Tensor

from spikelm.bench.limits import square_peak, wait
from spikelm.kernels.dispatch import OPS, use_backend
from spikelm.kernels.gla import gla, initial_state
from spikelm.kernels.gla.chunked import LONGEST_CHUNK

# B, T, H, G, K = V
SHAPES = ((1, 1024, 8, 8, 64), (1, 1024, 8, 2, 64), (1, 1024, 4, 4, 128))
GATES = ("channel", "head", "none")


def flops(batch: int, steps: int, heads: int, groups: int, size: int) -> float:
    """Operations of the chunked form's products: weights within chunks, their values, states in and out."""
    within = heads * (LONGEST_CHUNK * size + 2 * LONGEST_CHUNK * size)
    return float(batch * steps * (within + 2 * heads * size * size + 2 * groups * size * size))


def forms(device: torch.device) -> list[str]:
    """Back-ends of the op for this device."""
    fast = {"c": "cpu", "triton": "cuda"}
    return [form for form in OPS["gla"] if fast.get(form, device.type) == device.type]


def inputs(
    batch: int, steps: int, heads: int, groups: int, size: int, gate: str, device: torch.device
) -> list[Tensor | None]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).requires_grad_()

    width = {"channel": size, "head": 1, "none": 0}[gate]
    g = None
    if width:
        raw = torch.randn(batch, steps, groups, width, device=device)
        g = (torch.nn.functional.logsigmoid(raw) / 16).requires_grad_()
    keys, values = normal(batch, steps, groups, size), normal(batch, steps, groups, size)
    return [normal(batch, steps, heads, size), keys, values, g]


def alternate(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds, the calls taken in turns; the loops three times only."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(repeats):
        for name, call in calls.items():
            if "reference" in name and i >= 3:
                continue
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            taken[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in taken.items()}


def measure(shape: tuple[int, int, int, int, int], gate: str, repeats: int, device: torch.device) -> Any:
    torch.manual_seed(0)
    batch, steps, heads, groups, size = shape
    q, k, v, g = inputs(*shape, gate, device)
    assert q is not None and k is not None and v is not None
    state = initial_state(batch, groups, size, size, device)
    gradient = torch.randn(batch, steps, heads, size, device=device)
    leaves = [x for x in (q, k, v, g) if x is not None]

    def forward() -> Tensor:
        return gla(q, k, v, g, state, scale=size**-0.5)[0]

    def on(form: str, train: bool) -> Callable[[], object]:
        def run() -> object:
            with use_backend(form):
                if train:
                    return torch.autograd.grad(forward(), leaves, gradient)
                with torch.no_grad():
                    return forward()

        return run

    calls = {f"{form}_forward": on(form, False) for form in forms(device)}
    calls |= {f"{form}_forward_backward": on(form, True) for form in forms(device)}
    peak = square_peak(torch.float32, device)
    times = alternate(calls, repeats, device)
    # backward: two products for each one of forward
    limits = {"forward": 1e3 * flops(*shape) / peak, "forward_backward": 3e3 * flops(*shape) / peak}
    return {
        "shape": list(shape),
        "gate": gate,
        "gflop_forward": round(flops(*shape) / 1e9, 3),
        "ms": times,
        "limit_ms": {part: round(limit, 3) for part, limit in limits.items()},
        "share_of_limit": {
            f"{form}_{part}": round(limit / times[f"{form}_{part}"], 3)
            for form in forms(device)
            for part, limit in limits.items()
        },
    }


def main() -> None:
    """Measure every shape and gate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each fast form")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = []
    for shape in SHAPES:
        for gate in GATES:
            rows.append(measure(shape, gate, arguments.repeats, device))
            print(rows[-1], flush=True)
    if not arguments.no_record:
        print(record("gla", {"device": str(device), "rows": rows}))


if __name__ == "__main__":
    main()
