"""What watching costs: training steps with everything that is measured and logged, and without any of it.

    python benchmarks/train_overhead.py --rounds 20

Two trainers of the same run take turns, ten steps each (one log line of the watched one). Watched: a meter
and a log line every ten steps, TensorBoard, MFU, memory, the detector of loss spikes, and the hooks that
watch gradients. Unwatched: none of it. Which one goes first alternates, so that a machine that slows down
slows both; the overhead is the median over rounds of the ratio of the two times in a round, by the wall clock
and by the processor time of this process (all threads), which other programs disturb less. The control
compares two unwatched trainers in the same way: what it shows besides 0% is noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _record import record

from spikelm.bench.limits import wait
from spikelm.train import backend_torch
from spikelm.train.config import TrainConfig
from spikelm.train.reporting import silent_progress
from spikelm.train.trainer import Trainer

STEPS = 10
NEVER = 10**9


class NoWatch:
    """Stands in the unwatched run where hooks on every parameter would be."""

    def __init__(self, parameters: object) -> None: ...

    def end_micro_batch(self) -> None:
        """Nothing was seen."""

    def forget(self) -> None:
        """Nothing was seen."""

    def take(self) -> tuple[()]:
        """Nothing was seen."""
        return ()


def build(args: argparse.Namespace, folder: Path, watched: bool) -> Trainer:
    """A trainer whose steps can be taken one by one."""
    changes = [
        *(f"model={args.model}", f"batch_size={args.batch}", f"data.block_length={args.length}"),
        *(f"precision={args.precision}", f"device={args.device}", f"steps={NEVER}", f"out={folder}"),
        *(
            "eval_every=0",
            "sample_every=0",
            "checkpoint_every=0",
            "data.valid=null",
            "schedule.name=constant",
        ),
    ]
    if watched:
        changes += [f"log_every={STEPS}", "trackers=[tensorboard]", "measure_mfu=true"]
    else:
        changes += [f"log_every={NEVER}", "trackers=[]", "measure_mfu=false", "loss_spike.action='off'"]
    hooks = backend_torch.GradientWatch
    if not watched:
        backend_torch.GradientWatch = NoWatch  # type: ignore[assignment,misc]
    try:
        trainer = Trainer(TrainConfig.from_yaml("nano-sd", changes))
    finally:
        backend_torch.GradientWatch = hooks  # type: ignore[misc]
    folder.mkdir(parents=True)
    trainer._bad_in_a_row, trainer._returns, trainer._returned_to = 0, 0, -1
    trainer._header()
    trainer._metrics.measure(trainer._state)
    trainer.model.train()
    return trainer


def block(trainer: Trainer) -> tuple[float, float]:
    """Seconds of ten steps, wall clock and processor; a log line is due at the last one."""
    device = trainer._backend.device
    with silent_progress("") as bar:
        wait(device)
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            trainer._train_step(bar)
        wait(device)
    return time.perf_counter() - started, time.process_time() - worked


def paired(a: Trainer, b: Trainer, rounds: int) -> dict[str, Any]:
    """Overhead of ``a`` over ``b`` from rounds in which both take ten steps."""
    for trainer in (a, b):
        block(trainer)
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    seconds = []
    for index in range(rounds):
        order = (a, b) if index % 2 == 0 else (b, a)
        times = {id(trainer): block(trainer) for trainer in order}
        for clock, name in enumerate(ratios):
            ratios[name].append(times[id(a)][clock] / times[id(b)][clock] - 1.0)
        seconds.append(times[id(b)][0] / STEPS)
    found: dict[str, Any] = {"step_seconds": statistics.median(seconds)}
    for name, values in ratios.items():
        # Order statistics around the median that hold it with about 95% (binomial, normal approximation).
        ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
        low = ordered[max(0, int(len(values) / 2 - reach))]
        high = ordered[min(len(values) - 1, int(len(values) / 2 + reach))]
        found[name] = {"overhead": statistics.median(values), "interval_95": [low, high], "all": values}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="spikegpt-nano-sd", help="preset or YAML file")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of ten steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="train_overhead", help="name of the file under results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        watched = build(args, Path(folder) / "watched", True)
        plain = build(args, Path(folder) / "plain", False)
        again = build(args, Path(folder) / "again", False)
        figures = {
            "model": args.model,
            "batch": args.batch,
            "length": args.length,
            "precision": args.precision,
            "steps_per_log_line": STEPS,
            "rounds": args.rounds,
            "watched": paired(watched, plain, args.rounds),
            "control": paired(again, plain, args.rounds),
        }
        watched._trackers.close()
    for name in ("watched", "control"):
        for clock in ("wall", "cpu"):
            part = figures[name][clock]
            low, high = part["interval_95"]
            print(
                f"{name}, {clock} time: {part['overhead']:+.2%} of a step of "
                f"{figures[name]['step_seconds']:.3f} s (95%: {low:+.2%} to {high:+.2%})"
            )
    print(f"written to {record(args.name, figures)}")


if __name__ == "__main__":
    main()
