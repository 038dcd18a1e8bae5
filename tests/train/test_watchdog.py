"""A rank that fails, dies or hangs ends the run in time, and its own error is the first line that is read.

Real ranks under ``spikelm launch``; the fault lies in a neuron of another package (an entry point on the
path), so nothing that is shipped is patched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

TIMEOUT = 6.0

NEURON = """
import os, signal, sys, time
from spikelm.errors import TrainingError
from spikelm.neurons.heaviside import Heaviside
from spikelm.registry import neurons

@neurons.register("faulty")
class Faulty(Heaviside):
    slept = False

    def __init__(self, features, *, fault, rank, at, **options):
        super().__init__(features, **options)
        self.fault, self.rank, self.at = fault, rank, at

    def sequence(self, x, state, ctx):
        if self.training and ctx.step == self.at and int(os.environ.get("RANK", 0)) == self.rank:
            if self.fault == "raise":
                raise TrainingError("the neuron is worn out; rest")
            if self.fault == "bug":
                raise ZeroDivisionError("nobody foresaw this")
            if self.fault == "sleep":
                time.sleep(3600)
            if self.fault == "slow" and not Faulty.slept:
                Faulty.slept = True
                time.sleep(TIMEOUT / 2)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(self.fault, 0))
        return super().sequence(x, state, ctx)
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a package that offers the neuron ``faulty``."""
    folder = tmp_path / "packages"
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "faulty.py").write_text(NEURON.replace("TIMEOUT", str(TIMEOUT)))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[spikelm.neurons]\nfaulty = faulty:Faulty\n")
    return folder


def leftovers(mark: str) -> list[str]:
    """Command lines of living processes that contain ``mark``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if mark in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(words)
    return found


Run = Callable[..., tuple[int, list[str], float]]


@pytest.fixture
def run(make_values: Any, faulty: Path, tmp_path: Path) -> Run:
    """Run with a fault; exit code, lines of standard error, and seconds from the fault's step to the end."""

    def start(fault: str, rank: int, *options: str, at: int = 4) -> tuple[int, list[str], float]:
        neuron = {"name": "faulty", "fault": fault, "rank": rank, "at": at}
        values = make_values(
            steps=8, batch_size=4, log_every=1, eval_every=0, checkpoint_every=0, timeout=TIMEOUT
        )
        values["model"]["neuron"] = neuron
        config = tmp_path / "faulty.yaml"
        config.write_text(yaml.safe_dump(values))
        path = os.pathsep.join([str(faulty), *filter(None, [os.environ.get("PYTHONPATH")])])
        log = tmp_path / "run" / "log.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-m", "spikelm", "launch", *(options or ("--nproc", "2")), str(config)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "errors").open("w"),
        )
        while process.poll() is None and not (log.exists() and f'"step": {at},' in log.read_text()):
            time.sleep(0.05)
        reached = time.monotonic()
        try:
            code = process.wait(timeout=90)
        finally:
            process.kill()
        seconds = time.monotonic() - reached
        text = (tmp_path / "errors").read_text()
        for _ in range(40):
            if not leftovers(str(config)):
                break
            time.sleep(0.25)
        assert leftovers(str(config)) == []
        assert log.exists(), text
        return code, [line for line in text.splitlines() if line.startswith("rank ")], seconds

    return start


def test_a_hung_rank_is_named_before_those_that_wait_for_it(run: Run, tmp_path: Path) -> None:
    code, lines, seconds = run("sleep", 1)
    assert code == 1
    assert lines[0].startswith("rank 1: no progress for 6 s in step 5, phase forward; its Python stacks:")
    assert lines[1].startswith("rank 0: ended because rank 1 failed: no progress for 6 s in step 5")
    assert "in sequence" in (tmp_path / "errors").read_text()  # the frame of the neuron that sleeps
    assert TIMEOUT - 1 < seconds < TIMEOUT + 12


def test_a_killed_rank_is_named_by_the_other(run: Run) -> None:
    code, lines, seconds = run("kill", 1)
    assert code == 128 + signal.SIGKILL
    assert lines[0].startswith("rank 1: no sign of life for ") and "it was stopped or killed" in lines[0]
    assert "rank 1 was killed by SIGKILL" in lines[-1]
    assert seconds < TIMEOUT + 12


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_other_and_killed(run: Run) -> None:
    """SIGSTOP: its watchdog stands still as well, and no signal but SIGKILL ends it."""
    code, lines, seconds = run("stop", 1)
    assert code in (1, 128 + signal.SIGKILL)  # that of the rank that ended first
    assert lines[0].startswith("rank 1: no sign of life for ")
    assert TIMEOUT - 2 < seconds < TIMEOUT + 15


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_told_once(run: Run, rank: int) -> None:
    code, lines, seconds = run("raise", rank)
    assert code == 2
    assert lines == [
        f"rank {rank}: the neuron is worn out; rest",
        f"rank {1 - rank}: ended because rank {rank} failed: the neuron is worn out; rest",
    ]
    assert seconds < TIMEOUT + 12


@pytest.mark.slow
def test_an_unforeseen_error_keeps_its_traceback(run: Run, tmp_path: Path) -> None:
    code, lines, _ = run("bug", 1)
    assert code == 1
    assert lines[0] == "rank 1: ZeroDivisionError: nobody foresaw this"
    text = (tmp_path / "errors").read_text()
    assert text.count("Traceback (most recent call last)") == 1 and "faulty.py" in text


@pytest.mark.slow
def test_the_deepspeed_launcher_gives_the_same_sentences(run: Run) -> None:
    code, lines, _ = run("raise", 0, "--nproc", "2", "--deepspeed-launcher")
    assert code == 2
    assert lines[0] == "rank 0: the neuron is worn out; rest"


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(run: Run) -> None:
    code, lines, _ = run("slow", 1)
    assert (code, lines) == (0, [])


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed(make_values: Any, tmp_path: Path) -> None:
    """They save and go, as after SIGTERM: nobody is left who could stop them."""
    config = tmp_path / "orphans.yaml"
    config.write_text(
        yaml.safe_dump(make_values(steps=100000, log_every=1, eval_every=0, checkpoint_every=0))
    )
    log = tmp_path / "run" / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "spikelm", "launch", "--nproc", "2", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (log.exists() and '"event": "step"' in log.read_text()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while leftovers(str(config)) and time.monotonic() < until:
        time.sleep(0.25)
    assert leftovers(str(config)) == []
    assert '"event": "interrupted"' in log.read_text()
