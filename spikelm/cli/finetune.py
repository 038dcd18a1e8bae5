"""``spikelm finetune``: make a text classifier of a checkpoint, or train one from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikelm.cli._common import JsonOption, console, human_count, human_time, progress, warn, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from spikelm.train.finetune.seeds import Report

INTERRUPTED = 130


def finetune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_CHECKPOINT",
            help="YAML file, name of a preset in configs/finetune, or a checkpoint folder.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, as optim.lr=3e-4."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Runs with seeds of their own; mean and spread are told.")
    ] = None,
    json_file: JsonOption = None,
) -> int:
    """Fine-tune a text classifier and measure it.

    Labelled lines (`label text`, or .jsonl) go in; a folder with the classifier of the best epoch on the dev
    set, its model card and a report come out. With a checkpoint folder the data is named on the command
    line; with a preset, init_from=FOLDER starts from a checkpoint instead of random weights. Interrupted
    runs continue after their last whole epoch by the same command.

    Example: spikelm finetune subj init_from=runs/nano-sd --seeds 3
    """
    from spikelm.train.finetune.config import FinetuneConfig
    from spikelm.train.finetune.seeds import finetune as run

    pairs = list(overrides or [])
    if seeds is not None:
        pairs.append(f"seeds={seeds}")
    if Path(source).is_dir():
        config = FinetuneConfig.from_checkpoint(source, pairs)
    else:
        config = FinetuneConfig.from_yaml(source, pairs)
    report = run(config, progress=progress, warn=warn, title=f"finetune {Path(source).stem}")
    write_json(json_file, report.to_dict())
    if str(json_file) != "-":
        _show(report, console())
    return INTERRUPTED if report.interrupted == "SIGINT" else 0


def _show(report: Report, out: Console) -> None:
    """Figures of every seed, then mean and spread."""
    from rich.table import Table

    counts = report.task.counts()
    texts = ", ".join(f"{sum(found.values())} {part}" for part, found in counts.items())
    out.print(
        f"{human_count(report.parameters)} parameters, {len(report.task.labels)} classes, {texts} texts"
    )
    out.print(report.task.protocol, style="dim")
    table = Table(box=None)
    for heading in ("seed", "epoch", "dev accuracy", "test accuracy", "macro F1", "spike rate", "time"):
        table.add_column(heading)
    for run in report.runs:
        measured = run.test or run.dev
        rate = None if run.spikes is None else run.spikes["spike_rate"]
        table.add_row(
            str(run.seed),
            f"{run.best_epoch} of {run.epochs}",
            "-" if run.dev is None else f"{run.dev['accuracy']:.4f}",
            "-" if run.test is None else f"{run.test['accuracy']:.4f} ± {run.test['stderr']:.4f}",
            "-" if measured is None else f"{measured['macro_f1']:.4f}",
            "-" if rate is None else f"{rate:.1%}",
            human_time(run.seconds),
        )
    out.print(table)
    for part, figures in report.summary().items():
        accuracy = figures["accuracy"]
        if accuracy["sd"] is not None:
            out.print(
                f"{part} accuracy over {len(report.runs)} seeds: {accuracy['mean']:.4f}, standard deviation "
                f"{accuracy['sd']:.4f}"
            )
    if any(run.folder for run in report.runs):
        out.print(f"classifier: {report.out / 'best'}")
