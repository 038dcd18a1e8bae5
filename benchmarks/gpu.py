"""How near are the Triton kernels to this GPU's limits, and how do they stand beside torch and its peers?

    python benchmarks/gpu.py [--tiny --device cpu] [--json FILE]

Needs torch and triton alone; flash-linear-attention is timed beside them where it can be imported. Writes
results/gpu.json: the limits measured in this run (copy bandwidth, bf16 and int8 matrix products); for every
op and shape the median time of ours, of the torch form and of the peers, the L2 cache flushed before each
call, the share of the limit, and the seconds of our first call; and a model's decode step from Python
beside the captured graph. An op that is wrong beside the reference at a small shape is not timed; it stands
under "excluded" with the reason, and belongs into kernels/triton_excluded.py.

Without a GPU it says so and does nothing, unless ``--tiny --device cpu`` asks for its code to be run under
Triton's interpreter: those times mean nothing and are written only where --json says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAIN = dict(B=8, T=4096, H=32, K=128)
SMALL = dict(B=1, T=1024, H=12, K=64)
TINY = dict(B=2, T=20, H=2, K=16)
CHECK = dict(B=2, T=130, H=2, K=64)
SILENT = (0.0, 0.3, 0.5, 0.7, 0.9)
FLUSH = 256 << 20  # bytes: more than any L2 cache
REPEAT_MS = 100.0
TORCH_SECONDS = 5.0  # a torch form whose first call takes longer is not timed
CLOSE = {"float32": 2e-4, "bfloat16": 2e-2}
"""Largest root mean square of the error, relative to that of the reference.

float32 sums of some hundred terms in another order; bfloat16 results are rounded to 2^-9 and its gates too.
"""
SHARE = 1e-3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, three calls of each")
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--json", type=Path, help="file for the figures, instead of results/gpu.json")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu":
        if not chosen.tiny:
            parser.error("on a CPU the kernels are interpreted, which takes hours: add --tiny")
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    import torch

    if chosen.device != "cpu" and not torch.cuda.is_available():
        print("No GPU that torch can use on this machine, so there is nothing to measure.")
        return 0
    device = torch.device(chosen.device or "cuda")
    figures = measure(device, chosen.tiny, chosen.op)
    for line in lines(figures):
        print(line)
    from spikelm.bench.record import document

    if chosen.json is not None:
        chosen.json.write_text(json.dumps(document(figures), indent=2, allow_nan=False) + "\n")
    elif device.type == "cuda":
        from _record import record

        print(f"written to {record('gpu', figures)}")
    return 0


def measure(device: Any, tiny: bool, only: list[str] | None = None) -> dict[str, Any]:
    """Limits, then every case: checked, then timed."""
    import torch
    import triton
    from _gpu_decode import decode

    torch.manual_seed(0)
    timer = Timer(device, tiny)
    found = limits(timer, device, tiny)
    rows, excluded, began = [], [], time.perf_counter()
    dtypes = (torch.float32,) if tiny else (torch.bfloat16,)
    wrong = {}
    for dtype in dtypes:
        for case in cases(CHECK if device.type == "cuda" else TINY, dtype, device, tiny=True):
            if only and case.op not in only:
                continue
            reason = check(case)
            if reason is not None:
                wrong[case.op] = reason
                excluded.append({"op": case.op, "configuration": f"{case.name} {dtype}", "reason": reason})
        for shape in (TINY,) if tiny else (MAIN, SMALL):
            for case in cases(shape, dtype, device, tiny or shape is not MAIN):
                if case.op in wrong or (only and case.op not in only):
                    continue
                rows.append(timed(case, timer, found))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return {
        "triton": triton.__version__,
        "interpreted": device.type == "cpu",
        "limits": found,
        "rows": rows,
        "excluded": excluded,
        "decode": None if only else decode(device, tiny, timer),
        "seconds": round(time.perf_counter() - began, 1),
    }


def cases(shape: dict[str, int], dtype: Any, device: Any, tiny: bool) -> Iterator[Any]:
    """The cases at a shape; products and events at the width of the main shape, or at a small one."""
    from _gpu_cases import Shape, decoding, events, products, sequences

    s = Shape(**shape)
    yield from sequences(s, dtype, device)
    yield from decoding(s, dtype, device)
    if tiny and shape is SMALL:
        return
    width, group = (64, 32) if tiny else (4096, 128)
    yield from products(width, group, (3, 20) if tiny else (16, 64, 512, 8192), device)
    yield from events(width, group, (0.0, 0.7) if tiny else SILENT, device)


def check(case: Any) -> str | None:
    """What is wrong with our result or a gradient beside the reference, or None."""
    from spikelm.kernels.dispatch import use_backend

    inputs = case.make()
    try:
        with use_backend("triton"):
            ours = results(case, inputs)
    except Exception as error:  # noqa: BLE001  (whatever a compiler or driver raises is the finding)
        return f"{type(error).__name__}: {str(error)[:300]}"
    with use_backend("reference"):
        exact = results(case, {name: _double(value, case) for name, value in inputs.items()})
    for name, value in exact.items():
        got = ours[name].double()
        if not bool(got.isfinite().all()):
            return f"{name} is not finite"
        if case.compare != "close" and name in ("result", "pool"):
            differ = float((got != value.double()).double().mean())
            if differ > (0.0 if case.compare == "bits" else SHARE):
                return f"{name} differs from the reference in {differ:.2%} of its elements"
        elif case.compare == "close":
            error = float((got - value).square().mean().sqrt() / (value.square().mean().sqrt() + 1e-30))
            allowed = CLOSE[str(ours["result"].dtype).removeprefix("torch.")]
            if error > allowed:
                return f"{name} is off by {error:.1e} of its magnitude; allowed {allowed:.0e}"
    return None


def _double(value: Any, case: Any) -> Any:
    """float64 for a reference that is compared closely, else the dtype that ours had, in float32."""
    if not value.is_floating_point():
        return value
    return value.double() if case.compare == "close" else value.float()


def results(case: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Result, gradients of the leaves and a state pool that was updated in place."""
    import torch

    own = {name: value.clone() for name, value in inputs.items()}
    leaves = [own[name].requires_grad_() for name in case.leaves]
    y = case.call(**own)
    found = {"result": y.detach()}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        for name, value in zip(case.leaves, torch.autograd.grad(y, leaves, gradient), strict=True):
            found[f"gradient of {name}"] = value
    if "pool" in own:
        found["pool"] = own["pool"]
    return found


def timed(case: Any, timer: Timer, found: dict[str, float]) -> dict[str, Any]:
    """One row: ours, the torch form and the peers, forward and backward, with shares of the limit."""
    from spikelm.kernels.dispatch import use_backend

    row: dict[str, Any] = {"op": case.op, "case": case.name, "milliseconds": {}}
    inputs = case.make()
    for name, call in {"triton": case.call, "torch form": case.call, **case.peers}.items():
        backend = {"triton": "triton", "torch form": "torch"}.get(name, "auto")
        try:
            with use_backend(backend):
                forward, backward, first = timer.both(call, inputs, case.leaves, name != "triton")
        except Exception as error:  # noqa: BLE001  (out of memory, a peer's own errors: told, not fatal)
            row["milliseconds"][name] = f"{type(error).__name__}: {str(error)[:160]}"
            continue
        row["milliseconds"][name] = {"forward": forward, "backward": backward}
        if name == "triton":
            row["first_call_seconds"] = round(first, 3)
    peak = found.get(f"{case.peak}_tera_operations", 0.0) * 1e12
    for direction, size, flops in (
        ("forward", case.bytes, case.flops),
        ("backward", case.backward_bytes, case.backward_flops),
    ):
        if not size:
            continue
        limit = 1e3 * max(size / (found["copy_tera_bytes"] * 1e12), flops / peak if peak else 0.0)
        row[f"{direction}_limit_ms"] = round(limit, 6)
        ours = row["milliseconds"]["triton"]
        if isinstance(ours, dict) and ours[direction]:
            row[f"{direction}_share"] = round(limit / ours[direction], 4)
    return row


def limits(timer: Timer, device: Any, tiny: bool) -> dict[str, float]:
    """Copy bandwidth (read and written bytes) in TB/s, matrix products in T operations a second."""
    import torch

    size = 1 << (20 if tiny else 30)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"copy_tera_bytes": 2 * size / timer(lambda: b.copy_(a)) / 1e9}
    n = 64 if tiny else 8192
    x = torch.randn(n, n, device=device).to(torch.bfloat16)
    found["bf16_tera_operations"] = 2 * n**3 / timer(lambda: x @ x) / 1e9
    w = torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8)
    found["int8_tera_operations"] = 2 * n**3 / timer(lambda: torch._int_mm(w, w.t())) / 1e9
    return {name: round(value, 6) for name, value in found.items()}


class Timer:
    """Median milliseconds of a call, the L2 cache flushed before each.

    Args:
        device: CUDA events on a GPU, the clock on a CPU.
        tiny: three calls instead of REPEAT_MS of them.
    """

    def __init__(self, device: Any, tiny: bool) -> None:
        import torch

        self._cuda, self._tiny = device.type == "cuda", tiny
        self._flush = torch.empty(FLUSH if self._cuda else 1, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Median milliseconds of ``call``."""
        import torch

        call()
        began = time.perf_counter()
        self._wait()
        call()
        self._wait()
        estimate = max(1e3 * (time.perf_counter() - began), 1e-3)
        repeats = 3 if self._tiny else int(min(200, max(5, REPEAT_MS / estimate)))
        taken = []
        if not self._cuda:
            for _ in range(repeats):
                began = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - began))
            return statistics.median(taken)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in pairs:
            self._flush.zero_()
            start.record()
            call()
            stop.record()
        self._wait()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs)

    def both(
        self, call: Callable[..., Any], inputs: dict[str, Any], leaves: tuple[str, ...], other: bool
    ) -> tuple[float, float | None, float]:
        """Forward and backward milliseconds, and the seconds of the first call of both.

        Raises:
            TimeoutError: the first call of another than ours takes more than TORCH_SECONDS.
        """
        import torch

        began = time.perf_counter()
        own = {name: value.detach().requires_grad_(name in leaves) for name, value in inputs.items()}
        y = call(**own)
        wanted = [own[name] for name in leaves]
        gradient = torch.randn_like(y) if leaves else None

        def backward() -> object:
            return torch.autograd.grad(y, wanted, gradient, retain_graph=True)

        if leaves:
            backward()
        self._wait()
        first = time.perf_counter() - began
        if other and first > TORCH_SECONDS:
            raise TimeoutError(f"its first call took {first:.0f} s")
        plain = {name: value.detach() for name, value in inputs.items()}
        with torch.no_grad():
            forward = self(lambda: call(**plain))
        return round(forward, 5), round(self(backward), 5) if leaves else None, first

    def _wait(self) -> None:
        import torch

        if self._cuda:
            torch.cuda.synchronize()


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """The figures as text."""
    found = figures["limits"]
    yield (
        f"copy {found['copy_tera_bytes']:.2f} TB/s, bf16 {found['bf16_tera_operations']:.0f} and int8 "
        f"{found['int8_tera_operations']:.0f} T operations/s, Triton {figures['triton']}"
    )
    for row in figures["rows"]:
        for direction in ("forward", "backward"):
            if f"{direction}_limit_ms" not in row:
                continue
            told = []
            for name, taken in row["milliseconds"].items():
                value = taken[direction] if isinstance(taken, dict) else None
                told.append(f"{name} {value:.4f}" if value is not None else f"{name} failed ({taken})")
            share = row.get(f"{direction}_share")
            told.append("no share" if share is None else f"{share:.0%} of the limit")
            yield f"{row['case']:60} {direction:8} ms: {', '.join(told)}"
        yield f"{'':60} first call {row.get('first_call_seconds', '?')} s"
    for entry in figures["excluded"]:
        yield f"EXCLUDED {entry['configuration']}: {entry['reason']}"
    for name, value in (figures["decode"] or {}).items():
        yield f"decode, {name}: {value}"
    yield f"{figures['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
