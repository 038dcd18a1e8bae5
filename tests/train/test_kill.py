"""SIGKILL of ranks at random moments, by the script that `make soak` runs for hours."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_checkpoints.py"


def test_killed_ranks_come_to_the_same_end(tmp_path: Path) -> None:
    """Two ranks; the script compares weights, optimiser memory, progress and log bit for bit.

    Every other kill aims at a checkpoint that is being written. How many hit one is counted and left to
    chance (tests/train/test_checkpoints.py stops a write at each of its moments).
    """
    file = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--rounds", "2", "--ranks", "2", "--json", str(file)]
    done = subprocess.run(
        [*command, "--seed", str(time.time_ns() % 10**9)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (figures,) = json.loads(file.read_text())["figures"]["runs"]
    assert figures["kills"] == 2 == sum(figures["kills_of_each_rank"])
    assert figures["runs_compared_bit_for_bit"] >= 1
