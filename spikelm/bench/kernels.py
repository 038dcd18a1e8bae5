"""How fast are the CPU kernels on one thread? Every form of an op in turns, beside a copy of the same bytes.

The limit of an op that streams is the time of a copy that moves as many bytes; the peer of ``lif`` is
SpikingJelly's LIF node (torch back-end) in an environment of its own (:mod:`spikelm.bench.peers`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikelm.bench.peer import run
from spikelm.bench.timing import Call, alternate, summary
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.encode import adaptive_encode
from spikelm.kernels.lif import lif
from spikelm.kernels.wkv4 import initial_state, wkv4

STEPS, WKV_CHANNELS, LIF_CHANNELS = 1024, 512, 2048
ENCODE_CHANNELS = (512, 2048)
FORMS = ("c", "torch", "reference")
GOAL = 2.5
"""Times the copy that wkv4 and lif may take."""


def on(form: str, call: Call) -> Call:
    """The call on one back-end."""

    def run_there() -> object:
        with use_backend(form):
            return call()

    return run_there


def copying(num_bytes: int) -> Call:
    """A copy that moves this many bytes in all: half read, half written."""
    source = torch.ones(num_bytes // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def streamed(
    call: Callable[[], object], forward: Call, elements: int, passes: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Both directions and forward alone, in every form, beside copies of the bytes they must move.

    Args:
        call: forward and backward.
        forward: forward without gradients.
        elements: float32 elements of one tensor.
        passes: tensors that forward reads and writes, and that both directions do.
        repeats: of the timing.
    """
    sizes = [4 * elements * number for number in passes]
    calls = {form: on(form, call) for form in FORMS}
    calls |= {"c_forward": on("c", forward)}
    calls |= {"copy_of_forward": copying(sizes[0]), "copy_of_both": copying(sizes[1])}
    times = alternate(calls, repeats, {"reference": 3})
    c, copied = times["c"]["median_ms"], times["copy_of_both"]["median_ms"]
    return {
        "bytes": {"forward": sizes[0], "both": sizes[1]},
        "ms": times,
        "times_the_copy": {
            "forward": round(times["c_forward"]["median_ms"] / times["copy_of_forward"]["median_ms"], 2),
            "both": round(c / copied, 2),
        },
        "c_is_faster_than": {name: round(times[name]["median_ms"] / c, 1) for name in FORMS if name != "c"},
    }


def measure_wkv4(repeats: int) -> dict[str, Any]:
    """Wkv4: forward reads k and v and writes y; backward reads k, v, dy and writes dk, dv."""
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

    return {
        "shape": [1, STEPS, WKV_CHANNELS],
        **streamed(both, forward, k.numel(), (3, 8), repeats),
        "goal_times_the_copy": GOAL,
    }


def measure_lif(repeats: int, peer_python: Path | None) -> dict[str, Any]:
    """Lif at [1, STEPS, LIF_CHANNELS]: forward reads x, writes s; backward reads x, ds, writes dx."""
    torch.manual_seed(0)
    x = torch.randn(1, STEPS, LIF_CHANNELS)
    gradient = torch.randn(1, STEPS, LIF_CHANNELS)
    x.requires_grad_()
    v0, rate = torch.zeros(1, LIF_CHANNELS), torch.full((LIF_CHANNELS,), 0.5)

    def both() -> tuple[Tensor, Tensor]:
        s, _ = lif(x, v0, rate)
        (grad_x,) = torch.autograd.grad(s, (x,), gradient)
        return s, grad_x

    @torch.no_grad()
    def forward() -> object:
        return lif(x, v0, rate)

    result = {
        "shape": [1, STEPS, LIF_CHANNELS],
        **streamed(both, forward, x.numel(), (2, 5), repeats),
        "goal_times_the_copy": GOAL,
    }
    if peer_python is not None:
        with use_backend("c"):
            s, grad_x = (out.detach() for out in both())
        theirs = run(peer_python, "spikingjelly_node", [STEPS, LIF_CHANNELS, max(3, repeats // 4)])
        taken = summary([(wall, cpu) for wall, cpu in theirs["seconds"]])
        result["spikingjelly"] = {
            "version": theirs["version"],
            "torch": theirs["torch"],
            "ms": taken,
            "c_is_faster": round(taken["median_ms"] / result["ms"]["c"]["median_ms"], 1),
            "same_spikes": theirs["spikes"] == s.sum().item(),
            "gradient_norm_ratio": theirs["gradient_norm"] / grad_x.double().norm().item(),
        }
    return result


def measure_encode(repeats: int, channels: int) -> dict[str, Any]:
    """Adaptive encode at [STEPS, channels]: forward reads x, writes counts; backward reads dn, writes dx."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, STEPS, channels)
    x.requires_grad_()

    def both() -> object:
        counts, _ = adaptive_encode(x, k=3.0, dead_zone=1.0)
        return torch.autograd.grad(counts, x, gradient)

    @torch.no_grad()
    def forward() -> object:
        return adaptive_encode(x, k=3.0, dead_zone=1.0)

    return {"shape": [STEPS, channels], **streamed(both, forward, x.numel(), (2, 4), repeats)}


def measure(repeats: int = 40, spikingjelly_python: Path | None = None) -> dict[str, Any]:
    """Every streaming kernel on one thread.

    Args:
        repeats: timed calls of each form.
        spikingjelly_python: interpreter of an environment with spikingjelly, torch and loguru.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = {"wkv4": measure_wkv4(repeats), "lif": measure_lif(repeats, spikingjelly_python)}
        for channels in ENCODE_CHANNELS:
            figures[f"encode_{channels}"] = measure_encode(repeats, channels)
    finally:
        torch.set_num_threads(threads)
    return figures


def lines(figures: dict[str, Any]) -> list[str]:
    """The result in plain lines."""
    found = []
    for name, part in figures.items():
        ms, limit = part["ms"], part["times_the_copy"]
        found.append(
            f"{name} {part['shape']}: C {ms['c']['median_ms']:.2f} ms forward and backward "
            f"({limit['both']:.2f} times a copy of its bytes), forward {ms['c_forward']['median_ms']:.2f} ms "
            f"({limit['forward']:.2f} times); torch {ms['torch']['median_ms']:.1f} ms, "
            f"loop {ms['reference']['median_ms']:.0f} ms"
        )
        if "spikingjelly" in part:
            peer = part["spikingjelly"]
            found.append(
                f"  SpikingJelly {peer['version']}: {peer['ms']['median_ms']:.0f} ms, "
                f"ours is {peer['c_is_faster']:.1f} times faster"
            )
    return found
