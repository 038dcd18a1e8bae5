"""How much of the machine a run uses: FLOPs of the model per token over the FLOP/s that were measured here.

Model FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM, appendix B) =

    FLOPs per token x tokens per second / (measured peak of one rank, summed over the ranks)

What is counted is written at :func:`model_flops`, how the peak is found at :func:`gemm_peak`.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import nn

from spikelm.channels.experts import routed_shares

SIZES = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
BUDGET = 0.4
"""Seconds that the search for a peak may take (more only where the smallest product takes longer)."""
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The fastest square matrix product that was seen.

    Attributes:
        flops: FLOP/s of it, two per multiply-accumulate.
        size: its edge.
        dtype: ``fp32`` or ``bf16``, the precision of the run's products.
        threads: of torch on this process (they matter on a CPU only).
    """

    flops: float
    size: int
    dtype: str
    threads: int


def model_flops(model: nn.Module) -> int:
    """FLOPs of one training token, forward and backward, as MFU counts them.

    Every weight matrix of the model (``nn.Linear``: all projections, gates and the head) with in x out
    weights costs 2 x in x out FLOPs in the forward pass (two per multiply-accumulate), as many for the
    gradient of its input and, where it is trained, as many for the gradient of its weights: 6 x in x out.

    Of the routed experts of a mixture those that a token visits are counted, top_k of them.

    Not counted: recurrent and elementwise work (WKV, neurons, norms, softmax), embedding lookups (no
    product), the optimiser, and what activation checkpointing computes a second time (so checkpointing lowers
    MFU). Products are counted in full though most spikes are zero: this says how busy the machine is, not
    what spikes could save.
    """
    visited = 0.0
    shares = routed_shares(model)
    for matrix in model.modules():
        if isinstance(matrix, nn.Linear):
            flops = (6 if matrix.weight.requires_grad else 4) * matrix.in_features * matrix.out_features
            visited += flops * shares.get(matrix, 1.0)
    return round(visited)


def gemm_peak(device: torch.device, precision: str) -> Peak:
    """FLOP/s of the fastest square product on this device, in this precision, with this many threads.

    Sizes grow until the next one would not fit into :data:`BUDGET`; measured once per process. Torch's
    random state is left alone.

    Args:
        device: where to measure.
        precision: ``fp32`` or ``bf16``.
    """
    return _measured(str(device), precision, torch.get_num_threads())


@functools.lru_cache(maxsize=16)
def _measured(device: str, precision: str, threads: int) -> Peak:
    where = torch.device(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best, at, spent = 0.0, 0, 0.0
    for size in SIZES["cuda" if where.type == "cuda" else "cpu"]:
        flops = 2.0 * size**3
        if best and spent + (REPEATS + 1) * flops / best > BUDGET:
            break
        times = _times(size, dtype, where)
        spent += sum(times)
        if flops / min(times) > best:
            best, at = flops / min(times), size
    return Peak(flops=best, size=at, dtype=precision, threads=threads)


def _times(size: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Seconds of a few products of ``size``; the first one warms up, and counts only if it is the fastest."""
    source = torch.Generator(device).manual_seed(size)
    a, b = (torch.randn(size, size, generator=source, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(REPEATS + 1):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        times.append(time.perf_counter() - started)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
