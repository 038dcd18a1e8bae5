"""Histograms of counts against counting by hand, and the picture's cap."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.codings.statistics import CountHistogram
from spikelm.errors import DataError
from spikelm.plots import canvas, counts
from spikelm.plots.reading import SpikeMeter, read, sites


def histogram(values: list[int]) -> CountHistogram:
    found = CountHistogram()
    found.add(torch.tensor(values, dtype=torch.float32))
    return found


def test_shares_by_hand() -> None:
    found = counts.counts(
        {"blocks.0.mixer.key": histogram([0, 0, 0, 2, 2, -6, 6, 1])}, {"blocks.0.mixer.key": 6}
    )
    assert found["places"]["blocks.0.mixer.key"] == {
        "values": [-6, 0, 1, 2, 6],
        "share": [0.125, 0.375, 0.125, 0.25, 0.125],
        "total": 8,
        "cap": 6,
        "at_cap": 0.25,
        "silent": 0.375,
    }
    free = counts.counts({"a": histogram([300])}, {})["places"]["a"]
    assert free["cap"] is None and free["at_cap"] is None and free["values"] == [300]
    with pytest.raises(DataError, match="no counts were sent"):
        counts.counts({"a": CountHistogram()}, {})


def test_they_are_those_of_the_model(checkpoints: Callable[[str], Path]) -> None:
    """The meter's histogram is that of the counts kept whole, and agrees with the meter's own shares."""
    model = load_model(checkpoints("adaptive"))
    path = "blocks.1.channel.key"
    meter = SpikeMeter(raster=[path])
    read(model, list(b"spikes are rare"), meter=meter, chunk=4)
    kept = torch.cat(meter.rasters[path], 1)
    caps = {name: site.neuron.cap for name, site in sites(model).items()}  # type: ignore[attr-defined]
    entry = counts.counts(meter.histograms, caps)["places"][path]
    for value, share in zip(entry["values"], entry["share"], strict=True):
        assert share == pytest.approx(float((kept == value).double().mean()), abs=1e-12)
    assert math.fsum(entry["share"]) == pytest.approx(1.0)
    told = meter.summary()["projections"][path]
    assert entry["at_cap"] == pytest.approx(told["at_cap"])
    assert entry["silent"] == pytest.approx(told["silent"])
    assert entry["cap"] == 6 and max(map(abs, entry["values"])) <= 6


def test_spikes_outside_projections_are_counted(checkpoints: Callable[[str], Path]) -> None:
    model = load_model(checkpoints("after"))
    meter = SpikeMeter()
    read(model, list(b"spikes are rare"), meter=meter)
    found = counts.counts(meter.histograms, {})["places"]
    assert "blocks.2.channel_neuron" in found and set(found["blocks.2.channel_neuron"]["values"]) <= {0, 1}
    assert found.keys() == sites(model).keys()


def test_picture() -> None:
    places = {f"blocks.{i}.mixer.key": histogram([0, 0, i, -5, 5]) for i in range(3)}
    places["head"] = histogram([0, 1])
    figure = counts.draw(counts.counts(places, {"blocks.0.mixer.key": 5, "head": 127}))
    key, head = (axes for axes in figure.axes if axes.get_visible())
    assert "mixer.key (cap 5)" in key.get_title() and key.get_yscale() == "log"
    caps = [line for line in key.lines if line.get_linestyle() == "--"]
    assert sorted(line.get_xdata()[0] for line in caps) == [-5, 5]
    # A cap of 127 beside counts of 1 is told in the title, not drawn.
    assert "cap 127" in head.get_title() and not [x for x in head.lines if x.get_linestyle() == "--"]
    # Three layers; the outline of one: silence from -0.5 to 0.5 at its share, gaps where nothing occurred.
    x, y = next(np.asarray(line.get_data()) for line in key.lines if line.get_label() == "0")
    assert y[x == 0.5].tolist()[0] == pytest.approx(0.6)
    assert np.isnan(y[(x > 0.5) & (x < 4.5)]).all() and y[-1] == pytest.approx(0.2)
    assert canvas.rendered(figure, "svg")
