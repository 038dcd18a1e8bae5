"""``spikelm launch``: train on several GPUs or machines, check them first, or write a Slurm script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikelm.cli._common import JsonOption, progress

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig


def launch(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset in configs/train.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, as optim.lr=3e-4."),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc", min=1, help="Ranks on each machine; its GPUs, or 1, unless given.", show_default=False
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Number of machines.")] = None,
    node_rank: Annotated[
        int | None, typer.Option("--node-rank", min=0, help="Which of them this is, from 0.")
    ] = None,
    master: Annotated[
        str | None,
        typer.Option("--master", metavar="HOST:PORT", help="Where the machines meet: the first one."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            "--hostfile",
            metavar="FILE",
            help="Machines, one a line (NAME slots=N), for the DeepSpeed launcher.",
        ),
    ] = None,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed-launcher", help="Start the ranks through DeepSpeed's launcher.")
    ] = False,
    restarts: Annotated[
        int,
        typer.Option("--restarts", min=0, help="Start failed ranks again this often, from the checkpoint."),
    ] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare the ranks, time their connection and end.")
    ] = False,
    slurm: Annotated[
        Path | None,
        typer.Option(
            "--slurm", metavar="FILE", help="Start nothing; write an sbatch script (- for standard output)."
        ),
    ] = None,
    time: Annotated[
        str, typer.Option("--time", metavar="LIMIT", help="Time limit in the Slurm script.")
    ] = "24:00:00",
    json_file: JsonOption = None,
) -> int:
    """Train on several GPUs or machines.

    The configuration is checked before anything starts. Ranks are started by torchrun's agent, or with
    --hostfile by the DeepSpeed launcher; the same command continues a run that ended. Ctrl-C, SIGTERM and
    SIGUSR1 reach every rank: they finish the step, write a checkpoint and exit. When a rank fails or hangs,
    its error comes first and the others end with it.

    Example: spikelm launch --nproc 8 spikegpt-46m-enwik8 batch_size=128

    Example: spikelm launch --nodes 2 --node-rank 0 --master node1:29500 my.yaml (1 on the other)

    Example: spikelm launch --slurm job.sh --nodes 4 --nproc 8 my.yaml && sbatch job.sh
    """
    from spikelm.train.config import TrainConfig
    from spikelm.train.launch import plan, start

    chosen = TrainConfig.from_yaml(config, overrides or [])
    words = [config, *(overrides or [])]
    if json_file is not None:
        words += ["--json", str(json_file)]
    if slurm is not None:
        from spikelm.train.slurm import check_options, script, write

        check_options(node_rank=node_rank, master=master, hostfile=hostfile, deepspeed=deepspeed, check=check)
        _check(chosen, (nodes or 1) * (nproc or 1))
        text = script(words, nodes=nodes or 1, gpus=nproc or 1, limit=time, restarts=restarts)
        write(slurm, text)
        if str(slurm) != "-":
            print(f"wrote {slurm}; start it with: sbatch {slurm}", file=sys.stderr)
        return 0
    planned = plan(
        [*words, "--check"] if check else words,
        nproc=nproc,
        hostfile=hostfile,
        nodes=nodes,
        node_rank=node_rank,
        master=master,
        deepspeed=deepspeed,
        restarts=restarts,
    )
    _prepare(chosen, planned.world_size)
    return start(planned, say=lambda text: print(text, file=sys.stderr, flush=True))


def _check(config: TrainConfig, world_size: int) -> None:
    """What is better found out before there are ranks.

    Raises:
        SpikeLMError: the batch is too small for the ranks, or DeepSpeed cannot be used as configured.
    """
    from spikelm.errors import ConfigError

    if config.batch_size < world_size * config.accumulation:
        raise ConfigError(
            f"batch_size is {config.batch_size} for {world_size} ranks with accumulation "
            f"{config.accumulation}; each micro-batch needs a sample: raise batch_size or use fewer ranks"
        )
    if _uses_deepspeed(config):
        from spikelm.train.deepspeed_config import complete, read_settings

        complete(read_settings(config.deepspeed or "zero1"), config, world_size)


def _prepare(config: TrainConfig, world_size: int) -> None:
    """What is better found out, or built, before there are ranks."""
    _check(config, world_size)
    if _uses_deepspeed(config):
        from spikelm.train.deepspeed_config import read_settings
        from spikelm.train.ops import prepare

        prepare(read_settings(config.deepspeed or "zero1"), progress)


def _uses_deepspeed(config: TrainConfig) -> bool:
    return config.backend == "deepspeed" or (config.backend == "auto" and config.deepspeed is not None)
