"""Membranes against the equations by hand, and against the spikes that the model really sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.errors import ConfigError, DataError
from spikelm.meter import Meter
from spikelm.neurons.lif import IF, LIF, PLIF, IntegrateAndFire
from spikelm.plots import canvas
from spikelm.plots.membrane import draw, membrane
from spikelm.plots.reading import joined, read, sites


def test_hard_and_soft_reset_by_hand() -> None:
    x = torch.tensor([[1.0], [3.0], [0.0], [-2.0]])
    hard = membrane(LIF(1, tau=2.0, threshold=1.0), x, path="a")["channels"][0]
    # h = v + (x - v) / 2: 0.5; 1.75 fires, v = 0; 0; -1.
    assert hard["membrane"] == [0.5, 1.75, 0.0, -1.0]
    assert hard["spikes"] == [1] and hard["after"] == [0.5, 0.0, 0.0, -1.0]
    found = membrane(LIF(1, tau=2.0, threshold=1.0, reset="soft", decay_input=False), x, path="a")
    # h = v / 2 + x: 1 fires, v = 0; 3 fires, v = 2; 1 fires, v = 0; -2.
    assert found["channels"][0]["membrane"] == [1.0, 3.0, 1.0, -2.0]
    assert found["channels"][0]["spikes"] == [0, 1, 2] and found["reset"] == "soft"
    assert found["firing_rate"] == 0.75 and found["threshold"] == 1.0


@pytest.mark.parametrize("kind", [IF, LIF, PLIF])
@pytest.mark.parametrize(
    "options", [{}, {"reset": "soft", "gain": 1.7}, {"v_reset": -0.2, "decay_input": False}]
)
def test_every_neuron_fires_where_its_membrane_reaches_the_threshold(
    kind: type[IntegrateAndFire], options: dict[str, Any]
) -> None:
    if kind is IF:
        options = {key: value for key, value in options.items() if key != "decay_input"}
    neuron, x = kind(5, threshold=0.4, **options), torch.randn(40, 5)
    found = membrane(neuron, x, path="a", channels=range(5))
    spikes, _ = neuron(x[None])
    for row in found["channels"]:
        assert row["spikes"] == spikes[0, :, row["channel"]].nonzero()[:, 0].tolist()
        assert row["spikes"] == [t for t, h in enumerate(row["membrane"]) if h >= 0.4]
        rest = options.get("v_reset", 0.0)
        for h, v, t in zip(row["membrane"], row["after"], range(40), strict=True):
            wanted = h if t not in row["spikes"] else h - 0.4 if neuron.soft_reset else rest
            assert v == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", ["lif", "soft", "after"])
def test_the_spikes_are_those_of_the_model(name: str, checkpoints: Callable[[str], Path]) -> None:
    """Input and state are taken from the running model, in pieces, and give the spikes the meter saw."""
    model = load_model(checkpoints(name))
    tokens = list(b"spikes are rare; silence is cheap")
    for path, site in sites(model).items():
        meter = Meter(raster=[path])
        given = read(model, tokens, meter=meter, inputs=[site], chunk=7)[path]
        assert isinstance(site.neuron, IntegrateAndFire)
        found = membrane(site.neuron, given.x, given.state, path=path, channels=range(given.x.shape[1]))
        sent = joined(meter, path)
        for row in found["channels"]:
            assert row["spikes"] == sent[:, row["channel"]].nonzero()[:, 0].tolist(), path
        assert found["firing_rate"] == pytest.approx(float((sent != 0).double().mean()))


def test_channels_are_spread_and_checked() -> None:
    neuron = IF(6, threshold=1.0)
    x = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 1.0]).expand(20, 6)
    found = membrane(neuron, x, path="a")
    assert [row["channel"] for row in found["channels"]] == [1, 2, 4, 5], "the silent channel is left out"
    assert [row["channel"] for row in membrane(neuron, x * 0, path="a")["channels"]] == [0, 2, 3, 5]
    with pytest.raises(ConfigError, match="channel 6 does not exist; a has channels 0 to 5"):
        membrane(neuron, x, path="a", channels=[6])
    with pytest.raises(DataError, match="no token"):
        membrane(neuron, x[:0], path="a")
    figure = draw(found)
    assert len(figure.axes) == 4 and canvas.rendered(figure, "svg")
    lines = {line.get_label(): line for line in figure.axes[3].lines}
    assert lines["threshold"].get_ydata()[0] == 1.0
    assert list(lines["spike"].get_xdata()) == found["channels"][3]["spikes"]
