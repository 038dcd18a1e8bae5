"""Curves of a report: loss by position, and perplexity by length, of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spikelm.plots import canvas
from spikelm.plots.canvas import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float, float | None]
"""x, y, and the standard error of y where it is known."""


def draw(
    series: Mapping[str, Sequence[Point]],
    *,
    x: str,
    y: str,
    title: str,
    base: int = 2,
    from_zero: bool = False,
    theme: Theme = LIGHT,
) -> Figure:
    """One curve for each model over a logarithmic axis; the shade is one standard error either way.

    Args:
        series: label -> points in the order of x.
        x: what is on the x axis, with its unit.
        y: the same for the y axis.
        title: above the picture.
        base: of the x axis.
        from_zero: whether the y axis begins at 0 and ends at 1 (shares).
        theme: colours.
    """
    with canvas.on(theme):
        figure = canvas.blank(7.0, 4.0)
        axes = figure.subplots()
        for index, (label, points) in enumerate(series.items()):
            colour = canvas.COLOURS[index % len(canvas.COLOURS)]
            places = [point[0] for point in points]
            marker = canvas.MARKERS[index % len(canvas.MARKERS)]
            axes.plot(
                places,
                [point[1] for point in points],
                marker=marker,
                markersize=4,
                color=colour,
                label=canvas.plain(label),
            )
            errors = [point[2] or 0.0 for point in points]
            axes.fill_between(
                places,
                [point[1] - error for point, error in zip(points, errors, strict=True)],
                [point[1] + error for point, error in zip(points, errors, strict=True)],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        axes.set_xscale("log", base=base)
        if from_zero:
            axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(canvas.plain(title, 80))
        axes.grid(alpha=0.4)
        axes.legend(fontsize=8)
    return figure
