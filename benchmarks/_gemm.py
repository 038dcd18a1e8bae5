"""The machine's limit for matrix products, measured on the spot."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Shape = tuple[int, int]
"""(in_features, out_features) of a weight matrix."""


def wait(device: torch.device) -> None:
    """Let a GPU finish, so that the clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(
    work: Callable[[], object], device: torch.device, seconds: float = 1.0, least: int = 3
) -> float:
    """Shortest of several runs, at least ``least`` and as many as fit into ``seconds``, after one warm-up."""
    work()
    wait(device)
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < 200):
        started = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def square_peak(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of ``size``^3, the best of many runs."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), device)


def matrices(model: nn.Module) -> Counter[Shape]:
    """Shapes of the linear layers of a model, how often each occurs."""
    return Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))


def matmul_parameters(shapes: Counter[Shape]) -> int:
    """Weights that every token is multiplied with."""
    return sum(inputs * outputs * count for (inputs, outputs), count in shapes.items())


def own_shapes_peak(shapes: Counter[Shape], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of exactly the products of one training step: forward, input gradient and weight gradient."""
    total = flops = 0.0
    for (inputs, outputs), count in shapes.items():
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        w = torch.randn(outputs, inputs, device=device).to(dtype)
        g = torch.randn(tokens, outputs, device=device).to(dtype)
        for work in _products(x, w, g):
            total += count * best_seconds(work, device, seconds=0.2)
        flops += count * 6.0 * tokens * inputs * outputs
    return flops / total


def _products(x: Tensor, w: Tensor, g: Tensor) -> Iterable[Callable[[], Tensor]]:
    return (lambda: torch.mm(x, w.t()), lambda: torch.mm(g, w), lambda: torch.mm(g.t(), x))
