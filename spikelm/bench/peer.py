"""Start a peer's program in its own environment and read the figures that it prints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikelm.errors import ConfigError

TIMEOUT_S = 1800


def run(python: Path, program: str, arguments: Sequence[object], threads: int = 1) -> dict[str, Any]:
    """Figures of ``peers/PROGRAM.py``, run by another environment's Python.

    Args:
        python: its interpreter.
        program: name of the file, without suffix.
        arguments: command line of the program.
        threads: OMP_NUM_THREADS of the process.

    Raises:
        ConfigError: the interpreter does not exist, or the program failed (a missing package, mostly).
    """
    command = [
        str(python),
        str(Path(__file__).parent / "peers" / f"{program}.py"),
        *(str(argument) for argument in arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    # This project's modules must not reach the peer.
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"the peer {program} could not be started with {python}: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"the peer {program} failed in {python}: {last}; its file says what that environment needs"
        )
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
