"""A picture of training runs: loss, learning rate, gradient norm, speed, and spike rates per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikelm.plots import canvas
from spikelm.train.curves import RunCurves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_runs(runs: Sequence[RunCurves], path: str | Path, axis: str = "tokens") -> Path:
    """Write the curves of runs as a picture.

    Args:
        runs: one colour each; every run that spikes also gets a map of its layers.
        path: file to write, .png or .svg.
        axis: ``tokens``, ``steps`` or ``seconds``.

    Raises:
        ConfigError: the file cannot be written, or its format is unknown.
    """
    target = canvas.check_ending(Path(path))
    with canvas.on(canvas.LIGHT):
        return canvas.save(_drawn(runs, axis), target)


def _drawn(runs: Sequence[RunCurves], axis: str) -> Figure:
    spiking = [run for run in runs if run.layers()[0]]
    rows = 2 + len(spiking)
    figure = canvas.blank(12, 3.2 * rows)
    grid = figure.add_gridspec(rows, 2)
    loss, rate, norm, speed = (figure.add_subplot(grid[i // 2, i % 2]) for i in range(4))
    # Tokens whose bytes are not known have no bits per byte.
    in_bytes = all(np.isfinite(run.series("bits_per_byte")).any() for run in runs)
    key = "bits_per_byte" if in_bytes else "loss"
    for index, run in enumerate(runs):
        _draw_run(run, axis, key, canvas.COLOURS[index % len(canvas.COLOURS)], loss, rate, norm, speed)
    loss.set_ylabel("bits per byte (dots: held out)" if in_bytes else "nats per token (dots: held out)")
    rate.set_ylabel("learning rate")
    norm.set_ylabel("gradient norm before clipping")
    norm.set_yscale("log")
    utilised = any(np.isfinite(run.series("mfu")).any() for run in runs)
    speed.set_ylabel("share of the measured peak (MFU)" if utilised else "tokens per second")
    speed.set_ylim(bottom=0.0)
    for axes in (loss, rate, norm, speed):
        axes.set_xlabel(_label(axis))
        axes.grid(alpha=0.3)
    loss.legend(fontsize=8)
    for row, run in enumerate(spiking):
        _draw_layers(figure, figure.add_subplot(grid[2 + row, :]), run, axis)
    return figure


def _draw_run(
    run: RunCurves, axis: str, key: str, colour: str, loss: Any, rate: Any, norm: Any, speed: Any
) -> None:
    x = run.x(axis)
    loss.plot(x, run.series(key), color=colour, linewidth=1.2, label=canvas.plain(run.name))
    if run.evaluations:
        held_out = run.series(key, run.evaluations)
        loss.plot(run.x(axis, run.evaluations), held_out, "o", color=colour, markersize=4)
    for line in [*run.of("loss_spike"), *run.of("bad_step")]:
        loss.axvline(run.x(axis, [line])[0], color=colour, linestyle=":", linewidth=0.8)
    rate.plot(x, run.series("lr"), color=colour, linewidth=1.2)
    norm.plot(x, run.series("grad_norm"), color=colour, linewidth=1.0)
    mfu = run.series("mfu")
    speed.plot(
        x, mfu if np.isfinite(mfu).any() else run.series("tokens_per_second"), color=colour, linewidth=1.0
    )


def _draw_layers(figure: Any, axes: Any, run: RunCurves, axis: str) -> None:
    """Layers from bottom to top, their firing rate as colour."""
    names, rates = run.layers()
    x = run.x(axis)
    # Edges between the lines of the log: a run may have been logged unevenly.
    edges = np.concatenate(
        [[0.0], (x[1:] + x[:-1]) / 2, [x[-1] + (x[-1] - x[-2]) / 2 if len(x) > 1 else x[-1] * 2]]
    )
    image = axes.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, rates, cmap="cividis", vmin=0.0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("layer")
    axes.set_xlabel(_label(axis))
    axes.set_title(f"{canvas.plain(run.name)}: spike rate of each layer", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of inputs that fire")


def _label(axis: str) -> str:
    return "seconds of training steps" if axis == "seconds" else axis
