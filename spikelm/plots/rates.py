"""Firing rates: how many of its inputs every projection sees fire, by layer and by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spikelm.errors import DataError
from spikelm.plots import canvas
from spikelm.plots.canvas import LIGHT, Theme
from spikelm.plots.reading import place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTSIDE = "outside"
"""Column of what stands outside the blocks: the head, the neuron on the embedding."""


def rates(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Firing rates of a meter's summary as a table.

    Args:
        summary: of :meth:`spikelm.meter.Meter.summary`, or the ``spikes`` of a record.

    Returns:
        JSON values: ``layers`` (indices as text, then ``outside`` where something stands outside the
        blocks), ``kinds``, ``firing_rate`` [kinds][layers] (share of inputs that are not zero; None where
        there is no spiking input), ``dense`` [kinds][layers] (true where the input is not spikes), and
        ``mean`` [layers], the mean over a layer's spiking projections weighted by their input features.

    Raises:
        DataError: nothing in the summary spikes.
    """
    entries: list[tuple[str, str, Mapping[str, Any], bool]] = []
    for group in ("projections", "neurons"):
        for path, entry in summary.get(group, {}).items():
            index, kind = place(path)
            column = OUTSIDE if index is None else str(index)
            entries.append((column, kind, entry, group == "neurons" or bool(entry["spiking"])))
    if not any(spiking for *_, spiking in entries):
        raise DataError("nothing fires in this model (it is dense); choose a spiking one")
    layers = sorted({layer for layer, *_ in entries if layer != OUTSIDE}, key=int)
    if any(layer == OUTSIDE for layer, *_ in entries):
        layers.append(OUTSIDE)
    kinds = list(dict.fromkeys(kind for _, kind, *_ in entries))
    table: list[list[float | None]] = [[None] * len(layers) for _ in kinds]
    dense = [[False] * len(layers) for _ in kinds]
    fired, features = [0.0] * len(layers), [0.0] * len(layers)
    for layer, kind, entry, spiking in entries:
        row, at = kinds.index(kind), layers.index(layer)
        dense[row][at] = not spiking
        if spiking:
            table[row][at] = float(entry["firing_rate"])
            size = float(entry.get("in_features", entry.get("features", 0)))
            fired[at] += size * float(entry["firing_rate"])
            features[at] += size
    mean = [rate / size if size else None for rate, size in zip(fired, features, strict=True)]
    return {"layers": layers, "kinds": kinds, "firing_rate": table, "dense": dense, "mean": mean}


def draw(numbers: Mapping[str, Any], *, title: str = "firing rate", theme: Theme = LIGHT) -> Figure:
    """A map of :func:`rates`: kinds from top to bottom, layers from left to right."""
    import numpy as np

    layers, kinds = numbers["layers"], numbers["kinds"]
    table = np.array(
        [[np.nan if value is None else value for value in row] for row in numbers["firing_rate"]], dtype=float
    )
    with canvas.on(theme):
        figure = canvas.blank(max(5.5, 2.6 + 0.62 * len(layers)), max(2.6, 1.5 + 0.34 * len(kinds)))
        axes = figure.subplots()
        highest = float(np.nanmax(table)) or 1.0
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0.0, vmax=highest)
        # Figures are legible up to this many columns; beyond, the colour alone speaks.
        for row, column in np.ndindex(*table.shape) if len(layers) <= 16 else ():
            value = table[row, column]
            if np.isfinite(value):
                ink = "#ffffff" if value < 0.5 * highest else "#000000"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=ink, fontsize=8)
            elif numbers["dense"][row][column]:
                axes.text(column, row, "dense", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(kinds)), [canvas.plain(kind) for kind in kinds])
        axes.set_xlabel("layer")
        axes.set_ylabel("projection or neuron")
        axes.set_title(canvas.plain(title, 80))
        figure.colorbar(image, ax=axes, label="share of inputs that fire")
    return figure
