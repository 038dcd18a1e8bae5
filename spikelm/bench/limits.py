"""The machine's limits, measured on the spot: matrix products, reading from memory, copying."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.kernels.compile import load

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


def read_bandwidth(num_bytes: int, huge_pages: bool = True, seconds: float = 1.5) -> float:
    """Bytes per second that one thread reads, the best of many passes over the same ``num_bytes``.

    The fastest form counts: one stream fetched ahead by instruction, or one, two, four plain ones.

    What a decoder that reads its weights once for every token cannot exceed; memory that fits into a cache
    is faster than memory that does not, so ask for as many bytes as the decoder reads.

    Args:
        num_bytes: size of the memory.
        huge_pages: whether pages of 2 MiB are asked for.
        seconds: how long to measure.

    Raises:
        KernelError: there is no C compiler.
    """
    library = load(Path(__file__).with_name("read.c"))
    forms = [library[name] for name in ("read_ahead", "read_one", "read_two", "read_four")]
    for form in forms:
        form.argtypes, form.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    size = -(-num_bytes // _HUGE) * _HUGE
    # Shared pages, mmap's default, get no huge ones.
    private: dict[str, Any] = {}
    if hasattr(mmap, "MAP_PRIVATE"):
        private = {"flags": mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0)}
    with mmap.mmap(-1, size + _HUGE, **private) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        view = ctypes.c_char.from_buffer(memory)
        start = -(-ctypes.addressof(view) // _HUGE) * _HUGE
        ctypes.memset(start, 1, size)
        best = min(
            best_seconds(partial(form, start, size), torch.device("cpu"), seconds / len(forms), least=5)
            for form in forms
        )
        del view
    return size / best


def copy_bandwidth(num_bytes: int = 1 << 28, device: torch.device | None = None) -> float:
    """Bytes per second of a copy of ``num_bytes``, read and written ones counted."""
    device = torch.device("cpu") if device is None else device
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device)


_HUGE = 1 << 21
"""Bytes of a huge page."""
