"""How long training stands still for a checkpoint of the 46M model, written in the background and not.

The model takes one real step, so that its optimiser has its memory; then checkpoints are written by the code
that training uses, to a real disk with fsync and checksums: first once to touch the host memory for the first
time, then some of each kind in turn. In the background, training steps go on until the write is over, and
their time is compared with the time of steps when nothing is written.

    python benchmarks/checkpoint.py [--model spikegpt-46m] [--repeats 5] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _record import record

GOAL = 0.10
"""Training may be blocked for this share of the time that writing takes when training waits for it."""


def values(model: str, folder: Path) -> dict[str, Any]:
    """A run whose steps are as short as those of such a model can be."""
    return {
        "model": model,
        "data": {"train": "builtin:python-docs#train", "tokenizer": "bytes", "block_length": 64},
        "schedule": {"name": "constant"},
        "steps": 10**6,
        "batch_size": 1,
        "keep": 1,
        "log_every": 1,
        "trackers": [],
        "measure_mfu": False,
        "out": str(folder / "run"),
    }


def measure(model: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Blocked and written seconds, and the seconds of steps beside a write and without one."""
    from spikelm.train.config import TrainConfig
    from spikelm.train.reporting import silent_progress
    from spikelm.train.saving import Saving
    from spikelm.train.trainer import Trainer

    config = TrainConfig.from_dict(values(model, folder))
    trainer = Trainer(config)
    trainer.model.train()
    state, runner = trainer._state, trainer._runner

    def step() -> float:
        started = time.perf_counter()
        outcome = runner.take(state.samples, state.step, None)
        assert outcome.bad is None
        state.step += 1
        state.samples += 1
        return time.perf_counter() - started

    saving = {
        name: Saving(
            config.model_copy(update={"async_checkpoints": name == "asynchronous"}),
            trainer.store,
            trainer._backend,
            runner,
            trainer.tokenizer,
            trainer._identity,
            trainer.log,
            lambda bar, text: None,
            trainer.model.num_parameters(),
        )
        for name in ("synchronous", "asynchronous")
    }
    blocked: dict[str, list[float]] = {name: [] for name in saving}
    first: dict[str, float] = {}
    beside: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(trainer.store.held(trainer.ranks))
        bar = stack.enter_context(silent_progress("", None, "", 0))
        trainer.log.start()
        step()
        alone = [step() for _ in range(max(repeats, 3))]
        for repeat in range(repeats + 1):
            for name, kind in saving.items():
                step()
                started = time.perf_counter()
                kind.save(state, bar)
                seconds = time.perf_counter() - started
                while name == "asynchronous" and not kind.idle:
                    beside.append(step())
                    kind.check(bar)
                kind.finish(bar)
                if repeat == 0:
                    first[name] = seconds
                else:
                    blocked[name].append(seconds)
    events = trainer.log.read("checkpoint")
    medians = {name: statistics.median(found) for name, found in blocked.items()}
    return {
        "model": model,
        "parameters": trainer.model.num_parameters(),
        "bytes": events[-1]["bytes"],
        "files": events[-1]["files"],
        "repeats": repeats,
        "blocked_seconds": blocked,
        "blocked_seconds_median": medians,
        "blocked_seconds_of_the_first": first,
        "written_seconds_median": statistics.median(line["written_seconds"] for line in events[2:]),
        "blocked_share": medians["asynchronous"] / medians["synchronous"],
        "step_seconds_alone_median": statistics.median(alone),
        "step_seconds_beside_a_write_median": statistics.median(beside) if beside else None,
        "goal_share": GOAL,
        "goal_reached": medians["asynchronous"] < GOAL * medians["synchronous"],
    }


def main() -> int:
    """Measure, print, record; 1 if the goal was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="spikegpt-46m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure; else a temporary one"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(arguments.model, arguments.repeats, Path(folder))
    for key, value in figures.items():
        print(f"{key}: {value}")
    if not arguments.no_record:
        print(record("checkpoint", figures))
    return 0 if figures["goal_reached"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
