"""``spikelm train``: pretrain a model from a configuration, and continue a run that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikelm.cli._common import JsonOption, console, human_count, progress, write_json

if TYPE_CHECKING:
    from spikelm.train.preflight import Preflight
    from spikelm.train.result import TrainResult

INTERRUPTED = 130


def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset in configs/train.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, as optim.lr=3e-4."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare the ranks, look at the disk and end.")
    ] = False,
    json_file: JsonOption = None,
) -> int:
    """Pretrain a model.

    Runs resume by themselves: the same command continues at the newest checkpoint of the run's folder (key
    `out`), with the same numbers as if it had never stopped. Ctrl-C and SIGTERM finish the step and write a
    checkpoint. The folder `latest` in it is a checkpoint in the Hugging Face layout.

    Example: spikelm train nano-sd steps=500 optim.lr=5e-3 out=runs/nano
    """
    from spikelm.train.process import membership
    from spikelm.train.trainer import Trainer

    with membership(config, overrides or []) as member:
        trainer = Trainer(member.config, progress=progress, title=_title(config), ranks=member.ranks)
        if check:
            report = trainer.check()
            if member.ranks.main:
                _tell(report, json_file)
            return 0
        result = trainer.run()
        alone, main = member.ranks.world_size == 1, member.ranks.main
        if main:
            write_json(json_file, result.to_dict())
            if json_file is None or str(json_file) != "-":
                _print(result)
    # A launcher would take another code than 0 for a failure of what went as it was asked to.
    return INTERRUPTED if result.interrupted == "SIGINT" and alone else 0


def _tell(report: Preflight, json_file: Path | None) -> None:
    """What the preflight found."""
    write_json(json_file, report.to_dict())
    if json_file is None or str(json_file) != "-":
        print(report.line())
        for text in report.warnings:
            print(f"warning: {text}")


def _title(config: str) -> str:
    return f"train {Path(config).stem}"


def _print(result: TrainResult) -> None:
    """The result as a small table."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_row("steps", f"{result.step} of {result.steps}")
    table.add_row("parameters", human_count(result.parameters))
    table.add_row("tokens", f"{human_count(result.tokens)}, {human_count(result.tokens_per_second)} tokens/s")
    if result.train_loss is not None:
        table.add_row("training loss", f"{result.train_loss:.4f} nats/token")
    if result.evaluation is not None:
        figures = result.evaluation
        table.add_row(
            "held out", f"{figures.bits_per_byte:.4f} bits/byte, loss {figures.loss:.4f} nats/token"
        )
        if figures.spike_rate is not None:
            table.add_row("spike rate", f"{figures.spike_rate:.1%} of the inputs of spiking projections")
    table.add_row("checkpoint", str(result.checkpoint))
    console().print(table)
