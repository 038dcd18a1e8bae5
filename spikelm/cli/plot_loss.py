"""``spikelm plot loss``: the curves of training runs, as a picture and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import JsonOption, console, human_bytes, human_count, human_time, write_json

if TYPE_CHECKING:
    from spikelm.train.curves import RunCurves


def loss(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs (their key out), or log.jsonl files."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Picture to write (.png or .svg); curves.png in the first run if absent.",
        ),
    ] = None,
    axis: Annotated[
        str, typer.Option("--x", help="What is on the x axis: tokens, steps or seconds.")
    ] = "tokens",
    json_file: JsonOption = None,
) -> None:
    """Draw and sum up training runs.

    The picture has bits per byte on training and held-out text, learning rate, gradient norm, speed (as a
    share of the measured peak where it is known), and a map of spike rates per layer for every run that
    spikes. Several runs share the axes. A run may still be going on.

    Example: spikelm plot loss runs/nano-sd runs/nano-twin --out curves.png --x tokens
    """
    from spikelm.errors import ConfigError, nearest
    from spikelm.train.curves import AXES, RunCurves
    from spikelm.train.figure import draw_runs

    if axis not in AXES:
        raise ConfigError(nearest("x axis", axis, AXES))
    found = [RunCurves.read(run) for run in runs]
    if len({run.name for run in found}) < len(found):
        found = [replace(run, name=given) for run, given in zip(found, runs, strict=True)]
    first = Path(runs[0])
    target = out or (first if first.is_dir() else first.parent) / "curves.png"
    picture = draw_runs(found, target, axis)
    write_json(json_file, {"picture": picture, "runs": [run.to_dict() for run in found]})
    if json_file is None or str(json_file) != "-":
        _print(found, picture)


def _print(runs: Sequence[RunCurves], picture: Path) -> None:
    """One column for each run."""
    from rich.table import Table

    columns = [_column(run.summary()) for run in runs]
    table = Table(box=None)
    table.add_column("")
    for run in runs:
        table.add_column(run.name)
    for key in columns[0]:
        table.add_row(key, *(column[key] for column in columns))
    console().print(table)
    console().print(f"picture: {picture}")


def _column(summary: dict[str, Any]) -> dict[str, str]:
    def show(key: str, form: str) -> str:
        return "-" if summary[key] is None else format(summary[key], form)

    of = "" if summary["steps"] is None else f" of {summary['steps']}"
    best = (
        "-"
        if summary["best_step"] is None
        else f"{show('best_bits_per_byte', '.4f')} at step {summary['best_step']}"
    )
    trouble = {
        "resumes": summary["resumes"],
        "loss spikes": summary["loss_spikes"],
        "bad steps": summary["bad_steps"],
        "warnings": summary["warnings"],
    }
    return {
        "steps": f"{summary['step']}{of}",
        "tokens": human_count(summary["tokens"]),
        "time in steps": human_time(summary["seconds"]),
        "training bits/byte": show("train_bits_per_byte", ".4f"),
        "held out bits/byte": show("held_out_bits_per_byte", ".4f"),
        "best held out": best,
        "tokens/s (median)": "-"
        if summary["tokens_per_second"] is None
        else human_count(summary["tokens_per_second"]),
        "MFU (median)": show("mfu", ".1%"),
        "gradient norm": f"{show('grad_norm', '.3g')} (median), {show('largest_grad_norm', '.3g')} (largest)",
        "spike rate": show("spike_rate", ".1%"),
        "channels that never fired": show("never_fired", ".1%"),
        "memory (largest)": "-" if summary["peak_rss"] is None else human_bytes(summary["peak_rss"]),
        "events": ", ".join(f"{count} {name}" for name, count in trouble.items() if count) or "none",
    }
