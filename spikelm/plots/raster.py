"""Raster: tokens from left to right, channels from bottom to top, colour for the spike count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.plots import canvas
from spikelm.plots.canvas import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def raster(counts: Tensor, *, path: str, tokens: Sequence[str] | None = None) -> dict[str, Any]:
    """The spikes of one projection.

    Args:
        counts: [T, D] spike counts; 0 is silence.
        path: of the projection.
        tokens: T strings.

    Returns:
        JSON values: path, tokens, channels, firing_rate (share of counts that are not zero), mean_count
        (mean |count|), labels, and ``events``, a list of [token, channel, count] of all that are not zero.

    Raises:
        ShapeError: counts are not [T, D], or tokens are not T.
    """
    if counts.dim() != 2 or counts.numel() == 0:
        raise ShapeError(f"a raster needs counts [T, D], got {list(counts.shape)}")
    if tokens is not None and len(tokens) != counts.shape[0]:
        raise ShapeError(f"a raster of {counts.shape[0]} tokens got {len(tokens)} labels")
    values = counts.detach().float().cpu()
    where = values.nonzero()
    events = [[token, channel, int(values[token, channel])] for token, channel in where.tolist()]
    return {
        "path": path,
        "tokens": counts.shape[0],
        "channels": counts.shape[1],
        "firing_rate": float((values != 0).double().mean()),
        "mean_count": float(values.double().abs().mean()),
        "labels": None if tokens is None else list(tokens),
        "events": events,
    }


def draw(numbers: dict[str, Any], *, title: str | None = None, theme: Theme = LIGHT) -> Figure:
    """A picture of :func:`raster`."""
    import numpy as np

    values = np.zeros((numbers["channels"], numbers["tokens"]), dtype=np.float32)
    for token, channel, count in numbers["events"]:
        values[channel, token] = count
    # One very large count would make all others pale.
    reach = max(float(np.quantile(np.abs(values), 0.995)), 1.0)
    with canvas.on(theme):
        figure = canvas.blank(9.0, 4.8)
        axes = figure.subplots()
        # White is silence on either paper: the map's middle.
        image = axes.imshow(
            values,
            aspect="auto",
            origin="lower",
            cmap="PuOr",
            vmin=-reach,
            vmax=reach,
            interpolation="nearest",
        )
        name = canvas.plain(title or f"input of {numbers['path']}", 80)
        axes.set_title(f"{name}: {numbers['firing_rate']:.1%} of channels fire")
        axes.set_ylabel("channel")
        axes.set_xlabel("token")
        canvas.token_ticks(axes, numbers["labels"] or [])
        figure.colorbar(image, ax=axes, label="spike count")
    return figure


def draw_raster(path: str | Path, counts: Tensor, *, title: str, tokens: Sequence[str] | None = None) -> Path:
    """Write a spike raster as PNG or SVG.

    Args:
        path: file to write.
        counts: [T, D] spike counts of one projection's input; 0 is silence.
        title: above the picture; the firing rate is added.
        tokens: T strings, shown below the picture where they fit (up to 64).

    Raises:
        ShapeError: counts are not [T, D].
        ConfigError: the file cannot be written.
    """
    return canvas.save(draw(raster(counts, path=title, tokens=tokens), title=title), path)
