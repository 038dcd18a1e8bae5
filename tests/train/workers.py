"""Ranks of a test as real processes: how they are started, what they do, and which faults befall them.

    python workers.py JOBS.json

Each job is {"values": training configuration, "told": path, "faults": [...] or absent}; a rank writes what it
saw to told.RANK. One launch does as many jobs as it can, because a launch costs seconds of imports.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def start(
    world_size: int, arguments: Sequence[str], folder: Path, **variables: str
) -> list[subprocess.Popen[bytes]]:
    """Start ``python ARGUMENTS`` for every rank, as a launcher does; output goes to folder/rank-N.txt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = []
    for rank in range(world_size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        if world_size > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        with (folder / f"rank-{rank}.txt").open("wb") as output:
            found.append(
                subprocess.Popen([sys.executable, *arguments], env=environment, stdout=output, stderr=output)
            )
    return found


def said(folder: Path, world_size: int) -> str:
    """The end of what every rank printed."""
    return "\n".join(
        f"rank {rank}: {(folder / f'rank-{rank}.txt').read_text(errors='replace')[-3000:]}"
        for rank in range(world_size)
    )


def run_jobs(world_size: int, jobs: list[Job], folder: Path, timeout: float = 240.0) -> list[list[Any]]:
    """What every rank told about every job: ``[job][rank]``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(jobs):
        job["told"] = str(folder / f"told-{number}")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    processes = start(world_size, [__file__, str(folder / "jobs.json")], folder)
    until = time.monotonic() + timeout
    try:
        for rank, process in enumerate(processes):
            code = process.wait(max(1.0, until - time.monotonic()))
            assert code == 0, f"rank {rank} ended with {code}; " + said(folder, world_size)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        [json.loads(Path(f"{job['told']}.{rank}").read_text()) for rank in range(world_size)] for job in jobs
    ]


def break_trainer(trainer: Any, fault: dict[str, Any]) -> None:
    """Let a fault befall a trainer.

    ``kind``: ``loss`` or ``gradient`` (not finite on ``rank`` whenever one of ``samples`` is used, ``times``
    times at most), ``disk`` (files of ``rank`` may not grow beyond ``bytes``), ``signal`` (``name`` arrives
    at ``rank`` in step ``step``), ``kill`` (SIGKILL to itself in step ``step``).
    """
    if fault["rank"] != trainer.ranks.rank:
        return
    if fault["kind"] == "disk":
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (fault["bytes"], resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        return
    original = trainer._backend.loss
    left = [fault.get("times", 10**9)]

    def loss(inputs: Any, targets: Any, state: Any, ctx: Any, **options: Any) -> Any:
        output = original(inputs, targets, state, ctx, **options)
        if ctx.random is None:  # an evaluation
            return output
        if fault["kind"] in ("signal", "kill"):
            if ctx.step == fault["step"] - 1 and left[0]:
                left[0] = 0
                os.kill(
                    os.getpid(), signal.SIGKILL if fault["kind"] == "kill" else signal.Signals[fault["name"]]
                )
            return output
        if left[0] and set(ctx.random.stream.tolist()) & set(fault["samples"]):
            left[0] -= 1
            if fault["kind"] == "loss":
                return dataclasses.replace(output, loss=output.loss * math.nan)
            output.loss.register_hook(lambda gradient: gradient * math.nan)
        return output

    trainer._backend.loss = loss


def main(file: str) -> None:
    """Do the jobs, one after the other, in one group of ranks."""
    import torch

    from spikelm.errors import SpikeLMError
    from spikelm.train.config import TrainConfig
    from spikelm.train.ranks import join
    from spikelm.train.trainer import Trainer

    torch.set_num_threads(1)
    ranks = join(60.0, torch.device("cpu"))
    for job in json.loads(Path(file).read_text()):
        told: dict[str, Any] = {}
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            trainer = Trainer(TrainConfig.from_dict(job["values"]), ranks=ranks)
            for fault in job.get("faults", ()):
                break_trainer(trainer, fault)
            result = trainer.run()
            told |= {"step": result.step, "resumed": result.resumed_from, "interrupted": result.interrupted}
            told["backend"] = trainer._backend.name
        except SpikeLMError as error:
            told["error"] = f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        Path(f"{job['told']}.{ranks.rank}").write_text(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
