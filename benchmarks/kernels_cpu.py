"""How fast are the CPU kernels on one thread? wkv4, lif and encode, both ways, beside their torch forms.

    python benchmarks/kernels_cpu.py --peer-python /path/to/python-with-spikingjelly

Writes results/kernels_cpu.json: milliseconds (median and best of the repeats, the forms taken in turns, and
the median of the processor time, which other programs disturb less), the ratio to each peer, and the time a
plain copy of the same bytes takes in the same run. The peer is SpikingJelly's LIF node (torch back-end) in
an environment of its own:

    python -m venv peer && peer/bin/pip install torch loguru
    peer/bin/pip install --no-deps spikingjelly==2.0.0
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _record import record

from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.encode import adaptive_encode
from spikelm.kernels.lif import lif
from spikelm.kernels.wkv4 import initial_state, wkv4

STEPS, WKV_CHANNELS, LIF_CHANNELS = 1024, 512, 2048
ENCODE_CHANNELS = (512, 2048)
GOALS_MS = {"wkv4": 5.0, "lif": 10.0}
FORMS = ("c", "torch", "reference")


def milliseconds(taken: list[tuple[float, float]]) -> dict[str, float]:
    """Summary of (wall, processor) seconds."""
    wall = [seconds for seconds, _ in taken]
    return {
        "median_ms": round(1e3 * statistics.median(wall), 3),
        "best_ms": round(1e3 * min(wall), 3),
        "cpu_median_ms": round(1e3 * statistics.median(cpu for _, cpu in taken), 3),
        "repeats": len(taken),
    }


def alternate(calls: dict[str, Callable[[], object]], repeats: int, slow: dict[str, int]) -> dict[str, Any]:
    """Time the calls in turns, so that a busy moment of the machine falls on all of them."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # compiles, allocates, warms caches
    for i in range(repeats):
        for name, call in calls.items():
            if i >= slow.get(name, repeats):
                continue
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            seconds[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return {name: milliseconds(taken) for name, taken in seconds.items()}


def on(form: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with use_backend(form):
            return call()

    return run


def copying(num_bytes: int) -> Callable[[], object]:
    """A copy that moves this many bytes in all: half read, half written."""
    source = torch.ones(num_bytes // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure_wkv4(repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    w = torch.linspace(-5, 3, WKV_CHANNELS).requires_grad_()
    u = torch.randn(WKV_CHANNELS).requires_grad_()
    k, v = (torch.randn(1, STEPS, WKV_CHANNELS).requires_grad_() for _ in range(2))
    gradient, state = torch.randn(1, STEPS, WKV_CHANNELS), initial_state(1, WKV_CHANNELS)

    def both() -> object:
        y, _ = wkv4(w, u, k, v, state)
        return torch.autograd.grad(y, (w, u, k, v), gradient)

    @torch.no_grad()
    def forward() -> object:
        return wkv4(w, u, k, v, state)

    # forward reads k, v and writes y; backward reads k, v, grad y and writes grad k, grad v
    num_bytes = 8 * k.numel() * k.element_size()
    calls = {form: on(form, both) for form in FORMS}
    calls |= {"c_forward": on("c", forward), "copy_of_same_bytes": copying(num_bytes)}
    figures = alternate(calls, repeats, {"reference": 3})
    return {
        "shape": [1, STEPS, WKV_CHANNELS],
        "dtype": "float32",
        "bytes": num_bytes,
        "forward_backward": figures,
    }


def measure_lif(repeats: int, peer_python: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(1, STEPS, LIF_CHANNELS)
    gradient = torch.randn(1, STEPS, LIF_CHANNELS)
    x.requires_grad_()
    v0, rate = torch.zeros(1, LIF_CHANNELS), torch.full((LIF_CHANNELS,), 0.5)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        s, _ = lif(x, v0, rate)
        (grad_x,) = torch.autograd.grad(s, (x,), gradient)
        return s, grad_x

    @torch.no_grad()
    def forward() -> object:
        return lif(x, v0, rate)

    # forward reads x and writes s; backward reads x, grad s and writes grad x
    num_bytes = 5 * x.numel() * x.element_size()
    calls = {form: on(form, both) for form in FORMS}
    calls |= {"c_forward": on("c", forward), "copy_of_same_bytes": copying(num_bytes)}
    figures = alternate(calls, repeats, {"reference": 3})
    result: dict[str, Any] = {
        "shape": [1, STEPS, LIF_CHANNELS],
        "dtype": "float32",
        "bytes": num_bytes,
        "forward_backward": figures,
    }
    if peer_python is not None:
        with use_backend("c"):
            s, grad_x = (out.detach() for out in both())
        result |= peer(peer_python, max(3, repeats // 4), s.sum().item(), grad_x.double().norm().item())
        figures["spikingjelly"] = result["spikingjelly"]["time"]
    return result


def measure_encode(repeats: int, channels: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, gradient = torch.randn(2, STEPS, channels)
    x.requires_grad_()

    def both() -> object:
        counts, _ = adaptive_encode(x, k=3.0, dead_zone=1.0)
        return torch.autograd.grad(counts, x, gradient)

    @torch.no_grad()
    def forward() -> object:
        return adaptive_encode(x, k=3.0, dead_zone=1.0)

    # forward reads x and writes counts; backward reads grad counts and writes grad x
    num_bytes = 4 * x.numel() * x.element_size()
    calls = {form: on(form, both) for form in FORMS}
    calls |= {"c_forward": on("c", forward), "copy_of_same_bytes": copying(num_bytes)}
    return {
        "shape": [STEPS, channels],
        "dtype": "float32",
        "bytes": num_bytes,
        "forward_backward": alternate(calls, repeats, {"reference": 3}),
    }


def peer(python: Path, repeats: int, spikes: float, gradient_norm: float) -> dict[str, Any]:
    """SpikingJelly on the same numbers, and whether it computed the same."""
    script = Path(__file__).with_name("_peer_spikingjelly.py")
    command = [str(python), str(script), str(STEPS), str(LIF_CHANNELS), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    return {
        "spikingjelly": {
            "version": theirs["version"],
            "torch": theirs["torch"],
            "time": milliseconds([(wall, cpu) for wall, cpu in theirs["seconds"]]),
            "same_spikes": theirs["spikes"] == spikes,
            "gradient_norm_ratio": theirs["gradient_norm"] / gradient_norm,
        }
    }


def with_ratios(op: str, result: dict[str, Any]) -> dict[str, Any]:
    """Add how many times faster C is than every other form, by medians, and the goal if there is one."""
    times = result["forward_backward"]
    ours = times["c"]["median_ms"]
    result["c_is_faster_than"] = {
        name: round(taken["median_ms"] / ours, 1)
        for name, taken in times.items()
        if name not in ("c", "c_forward", "copy_of_same_bytes")
    }
    result["share_of_copy_speed"] = round(times["copy_of_same_bytes"]["median_ms"] / ours, 3)
    if op in GOALS_MS:
        result["goal_ms"] = GOALS_MS[op]
        result["goal_reached"] = ours <= GOALS_MS[op]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--peer-python", type=Path, help="python of an environment with spikingjelly 2.0.0")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, write no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        "wkv4": with_ratios("wkv4", measure_wkv4(options.repeats)),
        "lif": with_ratios("lif", measure_lif(options.repeats, options.peer_python)),
    }
    for channels in ENCODE_CHANNELS:
        figures[f"encode_{channels}"] = with_ratios("encode", measure_encode(options.repeats, channels))
    print(json.dumps(figures, indent=2))
    if not options.dry_run:
        print(f"written to {record('kernels_cpu', figures)}")


if __name__ == "__main__":
    main()
