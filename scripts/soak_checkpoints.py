"""Kill training processes with SIGKILL at random moments, resume by the same command, compare the end.

A small run is trained once without interruption and then again and again with kills: every round starts the
same command, waits a random time (in every second round until a checkpoint is being written), and kills one
rank with SIGKILL. The other ranks must end by themselves. When a run reaches its last step, its weights,
optimiser memory, progress and logged figures must be those of the uninterrupted run, bit for bit; then the
next run begins. (Two ranks on one machine too: the sum of two gradients has one order.)

    python scripts/soak_checkpoints.py --rounds 50 --ranks 1 --ranks 2 --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORDS = ("the", "spike", "of", "a", "neuron", "is", "small", "and", "many", "say", "what", "one", "cannot")
STEPS = 40
PATIENCE = 120.0
"""Seconds within which ranks must notice that another one is gone, and within which a life must end."""


def settings(folder: Path, out: Path) -> dict[str, Any]:
    """A run whose steps take milliseconds and which saves after every one."""
    return {
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "dropout": 0.1,
            "neuron": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0, "rate_target": {"target": 0.2}},
        },
        "data": {
            "train": str(folder / "train.txt"),
            "valid": str(folder / "valid.txt"),
            "block_length": 32,
            "cache": str(folder / "cache"),
        },
        "optim": {"lr": 3e-3},
        "schedule": {"warmup": 2},
        "steps": STEPS,
        "batch_size": 8,
        "eval_every": 10,
        "eval_batches": 2,
        "checkpoint_every": 1,
        "milestone_every": 16,
        "keep_best": True,
        "log_every": 1,
        "device": "cpu",
        "trackers": [],
        "measure_mfu": False,
        "timeout": 60.0,
        "out": str(out),
    }


def prepare(folder: Path) -> None:
    """Write the texts."""
    for name, factor in (("train", 7), ("valid", 11)):
        text = " ".join(WORDS[(factor * i * i + i) % len(WORDS)] for i in range(2400))
        (folder / f"{name}.txt").write_text(text)


def start(values: dict[str, Any], world_size: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """The command, once for every rank."""
    config = folder / "config.yaml"
    config.write_text(json.dumps(values))  # JSON is YAML
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = []
    for rank in range(world_size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        with (folder / f"rank-{rank}.txt").open("wb") as output:
            command = [sys.executable, "-m", "spikelm", "train", str(config)]
            found.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    return found


@contextmanager
def running(values: dict[str, Any], world_size: int, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks; whichever is left is killed at the end."""
    processes = start(values, world_size, folder)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Exit codes once all have ended, or None for those still there after ``seconds``."""
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.02)
    return [process.returncode for process in processes]


def said(folder: Path, world_size: int) -> str:
    """The end of what the ranks printed."""
    return "\n".join(
        (folder / f"rank-{rank}.txt").read_text(errors="replace")[-2000:] for rank in range(world_size)
    )


def finish(values: dict[str, Any], world_size: int, folder: Path) -> None:
    """Run to the last step.

    Raises:
        RuntimeError: a rank did not end well.
    """
    with running(values, world_size, folder) as processes:
        codes = wait(processes, PATIENCE)
    if codes != [0] * world_size:
        raise RuntimeError(f"exit codes {codes} of a run that nobody killed\n{said(folder, world_size)}")


def moment(out: Path, chance: random.Random, writing: bool, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until it is time to kill: some time after this life began to save, in a write where wanted."""
    partial, latest = out / "checkpoints" / ".partial", out / "latest"
    before = os.readlink(latest) if latest.is_symlink() else ""
    until = time.monotonic() + PATIENCE

    def alive() -> bool:
        return all(process.poll() is None for process in processes) and time.monotonic() < until

    while alive() and (os.readlink(latest) if latest.is_symlink() else "") == before:
        time.sleep(0.001)
    pause = time.monotonic() + chance.uniform(0.0, 0.8)
    while alive() and time.monotonic() < pause:
        time.sleep(0.001)
    if writing:
        while alive() and not any(partial.glob("step-*/content/*.safetensors")):
            pass


def difference(a: Path, b: Path) -> str:
    """What differs between two finished runs, or nothing."""
    import torch
    from safetensors.torch import load_file

    folders = [out / "checkpoints" / f"step-{STEPS:08d}" for out in (a, b)]
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders]
    if names[0] != names[1]:
        return f"files {names}"
    for name in names[0]:
        left, right = (load_file(folder / name) for folder in folders)
        for key in left.keys() | right.keys():
            if key not in left or key not in right or not torch.equal(left[key], right[key]):
                return f"{name}: {key}"
    records = [json.loads((folder / "training.json").read_text())["progress"] for folder in folders]
    for key in records[0]:
        if key != "seconds" and records[0][key] != records[1][key]:
            return f"progress: {key}"
    return "" if figures(a) == figures(b) else "the log"


def figures(out: Path) -> list[dict[str, Any]]:
    """Every logged number but the times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = ("tokens_per_second", "seconds", "step_seconds", "data_seconds", "mfu", "memory")
    return [
        {key: value for key, value in line.items() if key not in times}
        for line in lines
        if line["event"] in ("step", "evaluation")
    ]


def soak(world_size: int, rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill ``rounds`` times.

    Returns:
        counts and the final loss.

    Raises:
        RuntimeError: a run could not go on, did not end, or came to another end.
    """
    chance = random.Random(seed)
    prepare(folder)
    whole, out = folder / "whole", folder / "run"
    finish(settings(folder, whole), world_size, folder)
    values = settings(folder, out)
    kills, in_a_write, compared, tried = 0, 0, 0, 0
    by_rank = [0] * world_size
    lives = []
    while kills < rounds:
        tried += 1
        if tried > 3 * rounds + 10:
            raise RuntimeError(f"only {kills} of {tried} lives could be killed before they ended")
        with running(values, world_size, folder) as processes:
            moment(out, chance, writing=tried % 2 == 0, processes=processes)
            victim = chance.randrange(world_size)
            hit = processes[victim].poll() is None
            if hit:
                processes[victim].send_signal(signal.SIGKILL)
            codes = wait(processes, PATIENCE)
        if None in codes:
            raise RuntimeError(f"ranks still there after rank {victim} was killed: {codes}")
        if hit and codes[victim] == -signal.SIGKILL:
            kills += 1
            by_rank[victim] += 1
            # The kill leaves it there; a write that went on to its end removes it.
            in_a_write += (out / "checkpoints" / ".partial").exists()
        elif any(codes):
            raise RuntimeError(f"exit codes {codes} of ranks that nobody killed\n{said(folder, world_size)}")
        latest = out / "latest" / "training.json"
        lives.append(json.loads(latest.read_text())["progress"]["step"] if latest.is_file() else 0)
        if lives[-1] == STEPS or kills == rounds:
            finish(values, world_size, folder)
            if found := difference(whole, out):
                raise RuntimeError(f"after {kills} kills (seed {seed}) another end: {found}")
            compared += 1
            shutil.rmtree(out)
        print(f"{world_size} ranks: {kills} of {rounds} kills, {compared} runs compared", flush=True)
    return {
        "ranks": world_size,
        "kills": kills,
        "kills_of_each_rank": by_rank,
        "kills_during_a_write": in_a_write,
        "runs_compared_bit_for_bit": compared,
        "runs_that_differed": 0,
        "final_loss": figures(whole)[-1]["loss"],
        "seed": seed,
    }


def main() -> int:
    """Soak and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50, help="kills for each number of ranks")
    parser.add_argument("--ranks", type=int, action="append", help="number of ranks (may be given again)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, default=None, help="where the counts go")
    arguments = parser.parse_args()
    results = []
    started = time.perf_counter()
    for world_size in arguments.ranks or [1, 2]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(soak(world_size, arguments.rounds, arguments.seed, Path(folder)))
    print(json.dumps(results, indent=1))
    if arguments.json is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
        from _record import machine

        values = {
            "machine": machine(),
            "figures": {"seconds": time.perf_counter() - started, "runs": results},
        }
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
