"""``spikelm inspect``: what a model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from spikelm.cli._common import JsonOption, console, human_bytes, write_json
from spikelm.config import NO_NEURON
from spikelm.inspection import describe

if TYPE_CHECKING:
    from rich.console import Console

    from spikelm.inspection import Inspection, Layer


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, preset of configs/models, or .yaml file.")],
    json: JsonOption = None,
) -> None:
    """Show a model's parameters, state and parts, without loading its weights.

    Example: spikelm inspect spikegpt-216m-sd --json model.json
    """
    from spikelm.inspection import inspect_model

    inspection = inspect_model(model)
    if str(json) != "-":
        _show(inspection, console())
    write_json(json, inspection.to_dict())


def _show(inspection: Inspection, out: Console) -> None:
    config = inspection.config
    shape = (
        f"{config.num_hidden_layers} blocks of {config.hidden_size} features, {config.vocab_size:,} tokens"
    )
    active = inspection.active_parameters
    used = f" ({active:,} active per token)" if active != inspection.parameters else ""
    size = f"{inspection.parameters:,} parameters{used}"
    out.print(Text.assemble((inspection.name, "bold"), f": {size}, {shape}"))
    table = _table("parameters", "number", "share")
    for kind, count in inspection.parameters_by_kind.items():
        table.add_row(kind, f"{count:,}", f"{count / inspection.parameters:.1%}")
    out.print(table)
    growth = inspection.growth_bytes
    ending = f"and {human_bytes(growth)} more for every token" if growth else "the same after every token"
    out.print(f"State of one sequence: {human_bytes(inspection.state_bytes)} (float32), {ending}")
    if growth:
        lengths = (f"{human_bytes(size)} at {n:,}" for n, size in inspection.state_bytes_at.items())
        out.print(f"Memory grows with the text: {', '.join(lengths)} tokens")
    table = _table("state", "bytes")
    for kind, count in inspection.state_bytes_by_kind.items():
        table.add_row(kind, f"{count:,}")
    out.print(table)
    out.print(f"Neurons (placement: {config.placement})")
    table = _table("place", "neuron")
    for place, neuron in inspection.neurons.items():
        table.add_row(Text(place), Text(neuron))
    out.print(table)
    out.print("Blocks")
    out.print(_layers(inspection))
    out.print(f"Memory of the weights: {human_bytes(inspection.weight_bytes)} (float32 where not int8)")
    if inspection.weights is not None:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in inspection.weights["dtypes"].items())
        out.print(f"Weights: {human_bytes(inspection.weights['bytes'])} on disk, {dtypes}")


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for head in heads:
        numeric = head in {"number", "share", "bytes"}
        table.add_column(head, justify="right" if numeric else "left", overflow="fold")
    return table


def _layers(inspection: Inspection) -> Table:
    """One row for all equal blocks, and below it their projections."""
    config = inspection.config
    usual = describe(config.neuron if config.placement == "before" else NO_NEURON)
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for head in ("block", "part", "what"):
        table.add_column(head, overflow="fold")
    for head in ("parameters", "state bytes"):
        table.add_column(head, justify="right", no_wrap=True)
    groups: dict[str, list[Layer]] = {}
    for layer in inspection.layers:
        groups.setdefault(repr(replace(layer, index=0)), []).append(layer)
    for alike in groups.values():
        first, each = alike[0], " each" if len(alike) > 1 else ""
        sizes = (f"{first.parameters:,}{each}", f"{first.state_bytes:,}{each}")
        table.add_row(_span([layer.index for layer in alike]), "mixer", Text(first.mixer), *sizes)
        table.add_row("", "channel", Text(first.channel), "", "")
        for path, what in _alike(first.projections):
            # The neuron is told where it differs from the one that the table above names.
            table.add_row("", Text(f"  {path}"), Text(what.removesuffix(f", {usual}")), "", "")
    return table


def _alike(projections: Mapping[str, str]) -> list[tuple[str, str]]:
    """Projections of a block; those of equal experts in one row: ``channel.experts.0 to 63.up``."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for path, what in projections.items():
        before, found, after = path.partition(".experts.")
        number, _, name = after.partition(".")
        rows.setdefault((before, name, what), []).extend([int(number)] if found else [])
    return [
        (f"{path}.experts.{_span(numbers)}.{name}" if numbers else path, what)
        for (path, name, what), numbers in rows.items()
    ]


def _span(indices: list[int]) -> str:
    """[0, 1, 2, 3] -> ``0 to 3``; [0, 2, 4] -> ``0, 2, 4``."""
    if len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices))
