"""The table of firing rates: what stands where, and which mean is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm.checkpoint import load_model
from spikelm.errors import DataError
from spikelm.meter import Meter
from spikelm.plots import canvas, rates
from spikelm.plots.reading import read


def entry(rate: float, size: int, spiking: bool = True) -> dict[str, Any]:
    return {"firing_rate": rate, "in_features": size, "spiking": spiking}


SUMMARY = {
    "projections": {
        "blocks.0.mixer.key": entry(0.5, 10),
        "blocks.0.channel.key": entry(0.2, 30),
        "blocks.10.mixer.key": entry(0.1, 10),
        "blocks.2.mixer.key": entry(0.9, 10, spiking=False),
        "head": entry(1.0, 10, spiking=False),
    },
    "neurons": {"embedding_neuron": {"firing_rate": 0.25, "features": 8}},
}


def test_table_by_hand() -> None:
    found = rates.rates(SUMMARY)
    assert found["layers"] == ["0", "2", "10", "outside"]  # as numbers, not as words
    assert found["kinds"] == ["mixer.key", "channel.key", "head", "embedding_neuron"]
    assert found["firing_rate"] == [
        [0.5, None, 0.1, None],
        [0.2, None, None, None],
        [None, None, None, None],
        [None, None, None, 0.25],
    ]
    assert found["dense"][0] == [False, True, False, False] and found["dense"][2][3]
    # (10 x 0.5 + 30 x 0.2) / 40
    assert found["mean"] == [pytest.approx(0.275), None, 0.1, 0.25]
    figure = rates.draw(found, title="$x$ <script>")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"50%", "20%", "10%", "25%", "dense"} == texts
    assert canvas.rendered(figure, "png")


def test_silent_and_dense_models() -> None:
    silent = rates.rates({"projections": {"head": entry(0.0, 4)}})
    assert silent["firing_rate"] == [[0.0]] and canvas.rendered(rates.draw(silent), "svg")
    with pytest.raises(DataError, match="nothing fires"):
        rates.rates({"projections": {"head": entry(1.0, 4, spiking=False)}})
    with pytest.raises(DataError, match="nothing fires"):
        rates.rates({})


def test_it_is_the_meters(checkpoints: Callable[[str], Path]) -> None:
    meter = Meter()
    read(load_model(checkpoints("after")), list(b"spikes are rare"), meter=meter)
    summary = meter.summary()
    found = rates.rates(summary)
    for kind, row in zip(found["kinds"], found["firing_rate"], strict=True):
        for layer, value in zip(found["layers"], row, strict=True):
            path = kind if layer == "outside" else f"blocks.{layer}.{kind}"
            assert value == summary["neurons"].get(path, {}).get("firing_rate")
