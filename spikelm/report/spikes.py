"""Sections on spikes: firing rates by layer from the records, rasters and counts from the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spikelm.errors import DataError, SpikeLMError
from spikelm.plots import counts as counts_plot
from spikelm.plots import raster as raster_plot
from spikelm.plots import rates as rates_plot
from spikelm.plots.reading import SpikeMeter, joined, middle, read, sites
from spikelm.plots.samples import sample
from spikelm.report.document import Block, Picture, Section, Table, Text, number
from spikelm.report.quality import evaluations, text_of

Record = Mapping[str, Any]
TOKENS = 64
"""Tokens of a raster: as many as have room for their text below it."""


def rates(records: Sequence[Record]) -> Section | str:
    """A table of spikes of every model, and a map of firing rates of those that spike."""
    blocks: list[Block] = []
    for index, record in enumerate(evaluations(records)):
        rows = []
        pictures: list[Block] = []
        for place, (label, model) in enumerate(record["results"]["models"].items()):
            summary = model.get("spikes") or {}
            total = summary.get("total")
            if not total or not (summary.get("projections") or summary.get("neurons")):
                continue
            rows.append(
                (
                    label,
                    number(total.get("spiking_share"), ".1%"),
                    number(total.get("firing_rate"), ".1%"),
                    number(total.get("silent"), ".1%"),
                    number(total.get("mean_count")),
                )
            )
            try:
                numbers = rates_plot.rates(summary)
            except DataError:
                continue  # a dense model has no map; its row says so
            pictures.append(
                Picture(
                    name=f"firing-rates-{index + 1}-{place + 1}",
                    alt=f"Firing rate of every projection and neuron of {label} by layer. Layer means: "
                    + ", ".join(
                        f"{layer} {number(mean, '.1%')}"
                        for layer, mean in zip(numbers["layers"], numbers["mean"], strict=True)
                        if mean is not None
                    )
                    + ".",
                    draw=partial(_draw_rates, numbers, f"firing rate of {label}"),
                )
            )
        if rows:
            headings = ["model", "MACs with spikes", "inputs not zero", "silent inputs", "mean |count|"]
            caption = f"inputs of all projections, weighted by multiply-accumulates; {text_of(record)}"
            blocks += [Table(caption=caption, headings=headings, rows=rows), *pictures]
    if not blocks:
        return "Firing rates: no record of spikelm eval with spike counts was given."
    return Section(title="Firing rate by layer", blocks=blocks)


def rasters(
    checkpoints: Mapping[str, Path], text: str | None, without_neurons: Sequence[str] = ()
) -> tuple[Section | None, list[str]]:
    """A raster and histograms of counts of every model, while it reads a text.

    Args:
        checkpoints: label -> folder.
        text: what is read; None for no rasters.
        without_neurons: labels that were measured with their neurons off.

    Returns:
        The section, or None, and sentences about what could not be drawn.
    """
    blocks: list[Block] = []
    missing = []
    if not checkpoints or not text:
        what = "checkpoint" if not checkpoints else "text"
        return None, [f"Rasters and spike counts: no {what} was given to draw them from."]
    for index, (label, folder) in enumerate(checkpoints.items()):
        if label in without_neurons:
            missing.append(f"Raster of {label}: it was measured with its neurons off.")
            continue
        try:
            blocks += _of_one(label, folder, text, index + 1)
        except SpikeLMError as error:
            missing.append(f"Raster of {label}: {error}.")
    if not blocks:
        return None, missing
    lead = Text(
        text=f"Each model read the first {TOKENS} tokens of a text from its initial state. A raster shows "
        "tokens from left to right and channels from bottom to top; white is silence."
    )
    return Section(title="Rasters and spike counts", blocks=[lead, *blocks]), missing


def _of_one(label: str, folder: Path, text: str, index: int) -> list[Block]:
    from spikelm.checkpoint import load_model, load_tokenizer

    model = load_model(folder)
    found = sites(model)
    if not found:
        raise DataError("it is dense, nothing in it spikes")
    piece = sample(load_tokenizer(folder), text, most=TOKENS)
    site = middle(list(found.values()))
    meter = SpikeMeter(raster=[site.path])
    read(model, piece.tokens, meter=meter)
    raster = raster_plot.raster(joined(meter, site.path), path=site.path, tokens=piece.labels)
    caps = {path: getattr(site.neuron, "cap", None) for path, site in found.items()}
    counts = counts_plot.counts(meter.histograms, caps)
    largest = max(max(map(abs, entry["values"])) for entry in counts["places"].values())
    return [
        Picture(
            name=f"raster-{index}",
            alt=f"Raster of {label}, {site.path}, over {raster['tokens']} tokens: "
            f"{raster['firing_rate']:.1%} of channels fire, mean |count| {raster['mean_count']:.3g}.",
            draw=partial(_draw_raster, raster, f"{label}, {site.path}"),
        ),
        Picture(
            name=f"counts-{index}",
            alt=f"Histograms of the spike counts of {label} at {len(counts['places'])} places, on a "
            f"logarithmic scale; the largest count is {largest}.",
            draw=partial(_draw_counts, counts, label),
        ),
    ]


def _draw_rates(numbers: dict[str, Any], title: str, theme: Any) -> Any:
    return rates_plot.draw(numbers, title=title, theme=theme)


def _draw_raster(numbers: dict[str, Any], title: str, theme: Any) -> Any:
    return raster_plot.draw(numbers, title=title, theme=theme)


def _draw_counts(numbers: dict[str, Any], title: str, theme: Any) -> Any:
    return counts_plot.draw(numbers, title=title, theme=theme)
