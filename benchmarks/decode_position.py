"""Does decoding cost the same at any position? Time and memory of a step at 1k, 100k and a million tokens.

One sequence is read in parallel chunks up to each position, and the state reached there is kept. Then the
steps are timed, the positions taking turns so that a busy machine is busy for all of them. Reported per
position: the median seconds of a step, the bytes of the state, and the process's memory. Goal: time flat
within 2%. Without arguments: a nano model at 1k, 100k and 1M, and the 46M model at 1k and 100k.

    python benchmarks/decode_position.py
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _record import record
from torch import Tensor

from spikelm.bench.limits import wait
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
from spikelm.state import State, state_bytes, tree_map

DEFAULT_RUNS = ("spikegpt-nano:1000,100000,1000000", "spikegpt-46m:1000,100000")
MEBIBYTE = 1 << 20
CONTROL = -1  # key of the copy of the first position


def memory() -> tuple[float, float]:
    """Resident and peak resident memory of this process in MiB."""
    values = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("VmRSS:", "VmHWM:")):
            name, value, _ = line.split()
            values[name] = int(value) / 1024
    return values["VmRSS:"], values["VmHWM:"]


def reset_peak() -> None:
    """Start a new peak, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def prefill(model: SpikeLM, state: State, count: int, chunk: int, generator: torch.Generator) -> State:
    """Read ``count`` random tokens in chunks; the state after them."""
    device = model.embedding.weight.device
    while count > 0:
        width = min(chunk, count)
        tokens = torch.randint(0, model.config.vocab_size, (1, width), generator=generator)
        _, state = model(tokens.to(device), state, last_only=True)
        count -= width
    wait(device)
    return state


def time_steps(model: SpikeLM, state: State, tokens: Tensor) -> tuple[float, State]:
    """Mean seconds of a step over the given tokens [n, 1], and the state after them."""
    wait(tokens.device)
    started = time.perf_counter()
    for token in tokens:
        _, state = model(token, state)
    wait(tokens.device)
    return (time.perf_counter() - started) / len(tokens), state


def measure(preset: str, positions: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """One model at several positions."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(preset)).to(device).eval()
    generator = torch.Generator().manual_seed(1)
    state, at = model.init_state(1), 0
    kept: dict[int, State] = {}
    rows: dict[int, dict[str, float]] = {}
    torch.set_num_threads(args.prefill_threads)
    # A first chunk builds the kernels and warms the memory up; it counts nowhere.
    prefill(model, model.init_state(1), args.chunk, args.chunk, generator)
    reset_peak()
    for position in sorted(positions):
        started = time.perf_counter()
        state = prefill(model, state, position - at, args.chunk, generator)
        seconds = time.perf_counter() - started
        kept[position] = tree_map(torch.clone, state)
        resident, peak = memory()
        rows[position] = {
            "prefill_tokens_per_second": (position - at) / seconds,
            "state_bytes": state_bytes(state),
            "resident_mib": resident,
            "peak_mib": peak,
        }
        if device.type == "cuda":
            rows[position]["cuda_peak_mib"] = torch.cuda.max_memory_allocated(device) / MEBIBYTE
        at = position
        rate = rows[position]["prefill_tokens_per_second"]
        print(f"{preset}: position {position:,} reached, {rate:.0f} tokens/s", flush=True)
    torch.set_num_threads(args.threads)
    tokens = torch.randint(0, model.config.vocab_size, (args.steps, 1), generator=generator).to(device)
    # A copy of the first position, timed like the others, shows how much of a difference is noise.
    order = list(kept)
    kept[CONTROL] = tree_map(torch.clone, kept[order[0]])
    times: dict[int, list[float]] = {position: [] for position in kept}
    shuffled = random.Random(0)
    for round_ in range(args.rounds + 1):
        for position in shuffled.sample(list(kept), len(kept)):
            seconds, _ = time_steps(model, kept[position], tokens)
            if round_ > 0:
                times[position].append(seconds)
    control = statistics.median(times.pop(CONTROL))
    for position, seconds in times.items():
        rows[position]["step_seconds"] = statistics.median(seconds)
        rows[position]["steps_per_second"] = 1.0 / statistics.median(seconds)
    first = rows[order[0]]["step_seconds"]
    return {
        "parameters": model.num_parameters(),
        "positions": {str(position): row for position, row in rows.items()},
        "slowest_against_first": max(row["step_seconds"] for row in rows.values()) / first,
        "fastest_against_first": min(row["step_seconds"] for row in rows.values()) / first,
        "copy_of_first_against_first": control / first,
        "state_bytes_equal": len({row["state_bytes"] for row in rows.values()}) == 1,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """One line for each position."""
    print(f"{name} ({result['parameters']:,} parameters)")
    for position, row in result["positions"].items():
        print(
            f"  position {int(position):>9,}: {row['step_seconds'] * 1e3:.3f} ms/token, "
            f"state {row['state_bytes']:,} B, resident {row['resident_mib']:.0f} MiB, "
            f"peak {row['peak_mib']:.0f} MiB"
        )
    low, high = result["fastest_against_first"], result["slowest_against_first"]
    noise = result["copy_of_first_against_first"]
    print(f"  against the first position: {low:.4f} to {high:.4f}; a copy of the first: {noise:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", default=list(DEFAULT_RUNS), metavar="MODEL:POSITION,POSITION")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prefill chunk")
    parser.add_argument("--steps", type=int, default=10, help="steps of one timing; positions take turns")
    parser.add_argument("--rounds", type=int, default=150, help="timings of each position; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of the timed steps")
    parser.add_argument("--prefill-threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="decode_position", help="name of the file under results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"steps": args.steps, "rounds": args.rounds, "chunk": args.chunk}
    with torch.inference_mode():
        for run in args.runs:
            preset, _, places = run.partition(":")
            figures[preset] = measure(preset, [int(place) for place in places.split(",")], args)
            show(preset, figures[preset])
    print(f"written to {record(args.name, figures)}")


if __name__ == "__main__":
    main()
