"""SIGKILL of ranks at random moments, by the script that `make soak` runs for hours."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_checkpoints.py"


def test_killed_ranks_come_to_the_same_end(tmp_path: Path) -> None:
    """Two ranks; whether a kill hits a write is left to chance here (the other rank may finish the write)."""
    figures = killed(tmp_path, ranks=2, rounds=2)
    assert figures["runs_compared_bit_for_bit"] >= 1


def test_kills_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """One rank, whose write nobody finishes."""
    figures = killed(tmp_path, ranks=1, rounds=3)
    assert figures["runs_compared_bit_for_bit"] >= 1 and figures["kills_during_a_write"] >= 1


def killed(folder: Path, ranks: int, rounds: int) -> dict[str, Any]:
    """Figures of the script, which compares weights, optimiser memory, progress and log bit for bit."""
    file = folder / "figures.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--rounds",
        str(rounds),
        "--ranks",
        str(ranks),
        "--json",
        str(file),
    ]
    done = subprocess.run(
        [*command, "--seed", str(time.time_ns() % 10**9)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures: dict[str, Any]
    (figures,) = json.loads(file.read_text())["figures"]["runs"]
    assert figures["kills"] == rounds == sum(figures["kills_of_each_rank"])
    return figures
