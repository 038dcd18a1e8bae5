"""Membrane: the potential of integrate-and-fire neurons over tokens, with their threshold and spikes.

Drawn is h, the membrane after a token's input and before it fires (docs of ``spikelm.neurons.lif``): the
value that is compared with the threshold. After a spike the membrane is reset, so the next h starts low.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from spikelm.errors import ConfigError, DataError
from spikelm.neurons.lif import IntegrateAndFire
from spikelm.plots import canvas
from spikelm.plots.canvas import LIGHT, Theme
from spikelm.recurrence import EMPTY
from spikelm.state import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4
"""Channels that are drawn unless others are asked for."""


@torch.inference_mode()
def membrane(
    neuron: IntegrateAndFire,
    x: Tensor,
    state: State | None = None,
    *,
    path: str,
    channels: Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Membranes of a neuron over a sequence.

    Args:
        neuron: of the ``if``, ``lif``, ``plif`` family.
        x: its input [T, D].
        state: its state before the first token, for one sequence; at rest if None.
        path: where it stands.
        channels: which to follow; if None, :data:`SHOWN` channels evenly spaced by how often they fire,
            among those that fire at all (among all if none does).
        tokens: T strings.

    Returns:
        JSON values: path, threshold, v_reset, reset (``soft`` or ``hard``), tokens, labels, firing_rate (of
        all channels), and ``channels``, a list of {channel, membrane [T] (before firing), after [T] (after
        firing), spikes (tokens at which it fired)}.

    Raises:
        ConfigError: a channel that does not exist.
        DataError: the input is empty.
    """
    T, D = x.shape
    if T == 0:
        raise DataError("the neuron was given no token; expected at least one")
    for channel in channels or ():
        if not 0 <= channel < D:
            raise ConfigError(f"channel {channel} does not exist; {path} has channels 0 to {D - 1}")
    state = state or neuron.init_state(1, x.device)
    before, after, fired = [], [], []
    for t in range(T):
        before.append(neuron.charge(x[t : t + 1], cast(Tensor, state["membrane"]))[0])
        spikes, state = neuron.step(x[t : t + 1], state, EMPTY)
        after.append(cast(Tensor, state["membrane"])[0])
        fired.append(spikes[0] != 0)
    h, v, s = (torch.stack(values).cpu() for values in (before, after, fired))
    chosen = _spread(s.sum(0)) if channels is None else list(channels)
    return {
        "path": path,
        "threshold": neuron.threshold,
        "v_reset": neuron.v_reset,
        "reset": "soft" if neuron.soft_reset else "hard",
        "tokens": T,
        "labels": None if tokens is None else list(tokens),
        "firing_rate": float(s.double().mean()),
        "channels": [
            {
                "channel": channel,
                "membrane": h[:, channel].double().tolist(),
                "after": v[:, channel].double().tolist(),
                "spikes": s[:, channel].nonzero()[:, 0].tolist(),
            }
            for channel in chosen
        ],
    }


def _spread(fired: Tensor) -> list[int]:
    """Channels from the rarest to the most frequent, evenly spaced by rank."""
    ranked: list[int] = torch.argsort(fired, stable=True).tolist()
    loud = [channel for channel in ranked if fired[channel] > 0] or ranked
    count = min(SHOWN, len(loud))
    return [loud[round(i * (len(loud) - 1) / max(count - 1, 1))] for i in range(count)]


def draw(numbers: dict[str, Any], *, title: str | None = None, theme: Theme = LIGHT) -> Figure:
    """One row for each channel of :func:`membrane`."""
    rows = numbers["channels"]
    with canvas.on(theme):
        figure = canvas.blank(9.0, 1.3 + 1.35 * len(rows))
        grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        for axes, row in zip(grid, rows, strict=True):
            axes.plot(row["membrane"], color=canvas.COLOURS[0], linewidth=1.1, label="membrane before firing")
            axes.axhline(
                numbers["threshold"],
                color=canvas.COLOURS[1],
                linestyle="--",
                linewidth=1.0,
                label="threshold",
            )
            axes.plot(
                row["spikes"],
                [row["membrane"][t] for t in row["spikes"]],
                "^",
                color=canvas.COLOURS[4],
                markersize=5,
                label="spike",
            )
            axes.set_ylabel(f"channel {row['channel']}\nmembrane", fontsize=8)
            axes.grid(alpha=0.4)
        grid[-1].set_xlabel("token")
        canvas.token_ticks(grid[-1], numbers["labels"] or [])
        name = canvas.plain(title or numbers["path"], 60)
        grid[0].set_title(
            f"{name}: {numbers['firing_rate']:.1%} of channels fire, {numbers['reset']} reset "
            "(membrane in units of the input)"
        )
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure
