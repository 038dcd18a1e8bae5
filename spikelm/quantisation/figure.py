"""The picture of a k sweep: bits per byte and sparsity over k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # apart for colour-blind eyes
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_sweep(points: Sequence[Mapping[str, Any]], before: float, path: Path) -> None:
    """Write the picture.

    Args:
        points: one for each k: ``k``, ``bits_per_byte``, ``stderr_bits_per_byte``, ``silent``, ``codings``.
        before: bits per byte of the model as it was trained.
        path: file to write, a .png.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    k = [point["k"] for point in points]
    figure, (loss, sparsity) = pyplot.subplots(1, 2, figsize=(13.5, 4.5), layout="constrained")
    try:
        errors = [point["stderr_bits_per_byte"] or 0.0 for point in points]
        values = [point["bits_per_byte"] for point in points]
        loss.errorbar(k, values, yerr=errors, color=_COLOURS[0], marker="o", capsize=3, label="converted")
        loss.axhline(before, color="black", linestyle="--", linewidth=1.0, label="as trained")
        loss.set_ylabel("bits per byte, held out (bars: standard error)")
        names = [name for name in points[0]["codings"] if all("exact" in p["codings"][name] for p in points)]
        lines = [("silent channels", [point["silent"] for point in points])]
        for name in names:
            lines.append((f"{name}, exact window", [p["codings"][name]["exact"]["sparsity"] for p in points]))
        for name, limit in (("ternary", "3"), ("bidirectional", "7"), ("bidirectional", "15")):
            if name in names:
                rows = [p["codings"][name]["windows"][limit] for p in points]
                label = f"{name}, {rows[0]['steps']} micro-steps (larger counts cut)"
                lines.append((label, [row["sparsity"] for row in rows]))
        for index, (label, series) in enumerate(lines):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            style = "-" if index < len(_COLOURS) else "--"
            sparsity.plot(k, series, style, color=colour, marker=marker, markersize=5, label=label)
        sparsity.set_ylabel("share of zeros")
        sparsity.set_ylim(0.0, 1.0)
        for axes in (loss, sparsity):
            axes.set_xlabel("k (threshold = mean |x| / k)")
            axes.grid(alpha=0.3)
        loss.legend(fontsize=7)
        # Beside the lines: their places depend on the model, and a legend among them hides some.
        sparsity.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        figure.savefig(path, dpi=110, format="png")
    finally:
        pyplot.close(figure)
