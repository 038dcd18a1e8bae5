"""``spikelm plot``: pictures of spikes, of training runs and of results, one command for each kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from spikelm.cli import plot_spikes
from spikelm.cli._common import JsonOption, console, write_json
from spikelm.cli.plot_loss import loss
from spikelm.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping


class PlotGroup(TyperGroup):
    """The kinds of plots; a run given in place of one is told what to type."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or refuse with one sentence."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            if os.sep in name or Path(name).exists():
                raise ConfigError(
                    f"{name} is no kind of plot; to draw a training run use `spikelm plot loss {name}`"
                )
            raise ConfigError(nearest("plot", name, self.commands))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=PlotGroup,
    add_completion=False,
    no_args_is_help=True,
    help="Draw spikes, training runs and results; PNG or SVG, with --json for the numbers drawn.",
)
app.command("loss")(loss)
app.command("raster")(plot_spikes.raster)
app.command("rates")(plot_spikes.rates)
app.command("counts")(plot_spikes.counts)
app.command("membrane")(plot_spikes.membrane)
app.command("spectrum")(plot_spikes.spectrum)


@app.command("pareto")
def pareto(
    records: Annotated[
        list[Path],
        typer.Argument(metavar="RECORD.json...", help="Files that --json of spikelm eval and energy wrote."),
    ],
    figure: Annotated[
        str | None,
        typer.Option(
            "--figure",
            metavar="LABEL",
            help="Which bits per byte: carried, disjoint@1024, ...; first if absent.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Picture to write, .png or .svg.")
    ] = Path("pareto.png"),
    json_file: JsonOption = None,
) -> None:
    """Draw bits per byte against operations, bytes and seconds per token.

    A checkpoint appears once it has a record of spikelm eval and one of spikelm energy; the two are put
    together by the hash of its weights. The line joins the models that no other one beats in both.

    Example: spikelm plot pareto eval.json energy.json --out pareto.svg
    """
    from spikelm.evaluation.record import read
    from spikelm.plots import canvas
    from spikelm.plots import pareto as plot

    canvas.check_ending(out)
    numbers = plot.pareto([read(path) for path in records], figure)
    picture = canvas.save(plot.draw(numbers), out)
    write_json(json_file, {"picture": picture, **numbers})
    if str(json_file) != "-":
        _print(numbers, picture)


def _print(numbers: Mapping[str, Any], picture: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from spikelm.plots.pareto import COSTS

    table = Table(title=f"bits per byte: {numbers['figure']}; costs per token")
    for heading in ("model", "bits/byte", *COSTS, "on the front of"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in numbers["models"]:
        fronts = [cost for cost in COSTS if model["label"] in numbers["fronts"][cost]]
        values = [model["bits_per_byte"], *(model[cost] for cost in COSTS)]
        shown = ["-" if value is None else f"{value:.4g}" for value in values]
        table.add_row(escape(model["label"]), *shown, ", ".join(fronts) or "none")
    console().print(table)
    if numbers["unmatched"]:
        console().print(
            f"left out, for want of the other record: {', '.join(numbers['unmatched'])}", markup=False
        )
    console().print(f"picture: {picture}", markup=False)
