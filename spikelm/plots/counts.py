"""Counts: how often every projection was sent which integer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spikelm.codings.statistics import CountHistogram
from spikelm.errors import DataError
from spikelm.plots import canvas
from spikelm.plots.canvas import DARK, LIGHT, Theme
from spikelm.plots.reading import place

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def counts(histograms: Mapping[str, CountHistogram], caps: Mapping[str, int | None]) -> dict[str, Any]:
    """Histograms of spike counts.

    Args:
        histograms: path -> counts of that place.
        caps: path -> largest |count| its neuron sends; None or missing where there is none.

    Returns:
        JSON values: ``places``, path -> {values, share (of all counts, silence included, one per value that
        occurred), total, cap, at_cap (share of counts at the cap, None without one), silent}.

    Raises:
        DataError: there are no counts.
    """
    found: dict[str, Any] = {}
    for path, histogram in histograms.items():
        if not histogram.total:
            continue
        seen = histogram.bins > 0
        share = histogram.bins.double() / histogram.total
        cap = caps.get(path)
        found[path] = {
            "values": histogram.values[seen].tolist(),
            "share": share[seen].tolist(),
            "total": histogram.total,
            "cap": cap,
            "at_cap": None if cap is None else float(share[histogram.values.abs() >= cap].sum()),
            "silent": histogram.silent,
        }
    if not found:
        raise DataError("no counts were sent (the model is dense); choose a spiking one")
    return {"places": found}


def draw(numbers: Mapping[str, Any], *, title: str = "spike counts", theme: Theme = LIGHT) -> Figure:
    """Small histograms of :func:`counts`, one panel for each kind and a curve for each layer."""
    import matplotlib
    import numpy as np

    panels: dict[str, list[tuple[int | None, Mapping[str, Any]]]] = {}
    for path, entry in numbers["places"].items():
        layer, kind = place(path)
        panels.setdefault(kind, []).append((layer, entry))
    layers = sorted({layer for rows in panels.values() for layer, _ in rows if layer is not None})
    # The end of the map that is close to the colour of the paper is left out.
    ends = (0.35, 1.0) if theme is DARK else (0.05, 0.85)
    shades = matplotlib.colormaps["cividis"](np.linspace(*ends, max(len(layers), 1)))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with canvas.on(theme):
        figure = canvas.blank(max(4.5, 3.3 * columns), 0.6 + 2.3 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (kind, entries) in zip(grid.flat, panels.items(), strict=False):
            for layer, entry in entries:
                colour = canvas.COLOURS[0] if layer is None else shades[layers.index(layer)]
                axes.plot(
                    *_steps(entry), color=colour, linewidth=1.2, label=None if layer is None else f"{layer}"
                )
            caps = sorted({entry["cap"] for _, entry in entries if entry["cap"] is not None})
            low = min(min(entry["values"]) for _, entry in entries)
            high = max(max(entry["values"]) for _, entry in entries)
            for cap in caps:
                # A cap far beyond every count is told, not drawn: it would squeeze the histogram.
                if cap <= 3 * max(high, -low, 1):
                    for place_of_cap in (cap, -cap) if low < 0 else (cap,):
                        axes.axvline(place_of_cap, color=canvas.COLOURS[1], linestyle="--", linewidth=1.0)
            axes.set_yscale("log")
            said = f" (cap {', '.join(map(str, caps))})" if caps else ""
            axes.set_title(f"{canvas.plain(kind)}{said}", fontsize=9)
            axes.grid(alpha=0.4)
        figure.supxlabel("spike count (dashed: the cap)")
        figure.supylabel("share of inputs")
        named = f"{canvas.plain(title, 60)}, layers {layers[0]} to {layers[-1]}" if layers else title
        figure.suptitle(named + (" from dark to light" if len(layers) > 1 else ""), fontsize=11)
    return figure


def _steps(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """Corners of the outline of a histogram; counts that never occurred are gaps on a logarithmic axis."""
    import numpy as np

    values = np.array(entry["values"])
    full = np.arange(values[0], values[-1] + 1)
    share = np.full(len(full), np.nan)
    share[values - values[0]] = entry["share"]
    return np.stack([full - 0.5, full + 0.5], 1).reshape(-1), np.repeat(share, 2)
