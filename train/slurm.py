"""An sbatch script for a run on a Slurm cluster: one launcher per machine, stopped in time and requeued."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from spikelm.errors import ConfigError
from spikelm.train.files import why

_LIMIT = re.compile(r"^(\d+-)?\d{1,3}(:\d{2}){0,2}$")
_CPUS_PER_GPU = 8
_MARGIN = 300  # seconds before the time limit at which the ranks are told to save


def check_options(
    *, node_rank: int | None, master: str | None, hostfile: Path | None, deepspeed: bool, check: bool
) -> None:
    """Refuse options that the script decides by itself.

    Raises:
        ConfigError: one of them was given.
    """
    given = {
        "--node-rank": node_rank is not None,
        "--master": master is not None,
        "--hostfile": hostfile is not None,
        "--deepspeed-launcher": deepspeed,
        "--check": check,
    }
    wrong = next((name for name, present in given.items() if present), None)
    if wrong is not None:
        raise ConfigError(
            f"{wrong} does not go with --slurm, whose script asks Slurm for the machines; leave it out"
        )


def script(words: Sequence[str], *, nodes: int, gpus: int, limit: str, restarts: int = 0) -> str:
    """The text of an sbatch script.

    Args:
        words: what each rank is given: configuration, overrides, options.
        nodes: machines.
        gpus: GPUs, and so ranks, of each.
        limit: time limit as Slurm writes it: ``24:00:00``, ``2-12:00:00``.
        restarts: how often failed ranks are started again within the job.

    Raises:
        ConfigError: the time limit is not one, or too short to save before it.
    """
    if not _LIMIT.match(limit):
        raise ConfigError(
            f"--time is {limit!r}; expected hours:minutes:seconds or days-hours, as 24:00:00 or 2-12"
        )
    if seconds_of(limit) <= _MARGIN:
        raise ConfigError(
            f"--time is {limit!r}, and the ranks are told to save {_MARGIN} seconds before it; give it more"
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(words[0]).stem).strip("-") or "run"
    restart = ["--restarts", str(restarts)] if restarts else []
    rank = shlex.join(["--nproc", str(gpus), *restart, *words])
    return _SCRIPT.format(
        name=name,
        nodes=nodes,
        gpus=gpus,
        cpus=_CPUS_PER_GPU * gpus,
        limit=limit,
        margin=_MARGIN,
        minutes=_MARGIN // 60,
        run=(_SEVERAL if nodes > 1 else _ALONE).format(rank=rank),
    )


def seconds_of(limit: str) -> int:
    """Seconds of a time limit: ``MINUTES``, ``MINUTES:SECONDS``, ``H:M:S``, ``DAYS-H``, ``DAYS-H:M:S``."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        parts += [0] * (3 - len(parts))
    else:
        parts = [0, *parts, *[0] * (2 - len(parts))]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def write(path: Path, text: str) -> None:
    """Write the script, executable; ``-`` is standard output.

    Raises:
        ConfigError: the file cannot be written.
    """
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"the Slurm script {path} cannot be written ({why(error)})") from error


_ALONE = """\
srun --kill-on-bad-exit=1 spikelm launch {rank} &
step=$!"""

_SEVERAL = """\
# All machines meet at the first one; the port is the job's own, so that two jobs may share a machine.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# Each machine's own shell fills in its number; exec, so that signals reach the launcher and not that shell.
srun --kill-on-bad-exit=1 bash -c 'exec spikelm launch --node-rank "$SLURM_NODEID" "$@"' launch \\
    --nodes "$SLURM_NNODES" --master "$head:$port" {rank} &
step=$!"""

_SCRIPT = """\
#!/bin/bash
# Written by spikelm launch --slurm. Start it with sbatch; the same script continues a run that ended.
# What your cluster wants beside this (partition, account, memory) goes here or into the options of sbatch.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={limit}
#SBATCH --signal=B:USR1@{margin}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# One task a machine: a launcher, which starts one rank for each GPU. This shell hears SIGUSR1 {minutes}
# minutes before the limit. The job queues again by itself, also after a machine failed; it has one log.

set -uo pipefail

# Activate the environment that has spikelm, for example:
# source "$HOME/venvs/spikelm/bin/activate"

# srun does not inherit this from sbatch, and without it all ranks would share one processor.
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

{run}

# The limit comes near: srun passes the signal on, every rank finishes its step, saves and exits.
requeue=no
trap 'requeue=yes; kill -USR1 "$step"' USR1

# The trap ends the first wait while the ranks still save; the second one gives what they gave.
wait "$step"
code=$?
if [ "$requeue" = yes ]; then
    wait "$step"
    code=$?
fi

if [ "$requeue" = yes ] && [ "$code" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
