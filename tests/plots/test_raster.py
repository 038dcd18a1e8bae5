"""The raster's events are the counts, and the picture shows them where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spikelm.errors import ShapeError
from spikelm.plots import raster


def test_events_by_hand() -> None:
    counts = torch.tensor([[0.0, 2.0, 0.0], [-1.0, 0.0, 0.0]])
    found = raster.raster(counts, path="a.b", tokens=["x", "$y$"])
    assert found == {
        "path": "a.b",
        "tokens": 2,
        "channels": 3,
        "firing_rate": pytest.approx(1 / 3),
        "mean_count": 0.5,
        "labels": ["x", "$y$"],
        "events": [[0, 1, 2], [1, 0, -1]],
    }
    axes = raster.draw(found).axes[0]
    # Channels upwards, tokens to the right.
    assert np.array_equal(axes.images[0].get_array(), counts.numpy().T)
    assert axes.images[0].origin == "lower"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", r"\$y\$"]
    assert "33.3% of channels fire" in axes.get_title()


def test_shapes_are_checked() -> None:
    for counts in (torch.zeros(3), torch.zeros(0, 4), torch.zeros(1, 2, 3)):
        with pytest.raises(ShapeError, match="T, D"):
            raster.raster(counts, path="a")
    with pytest.raises(ShapeError, match="2 tokens got 1 labels"):
        raster.raster(torch.zeros(2, 3), path="a", tokens=["x"])
    silent = raster.raster(torch.zeros(100, 3), path="a", tokens=["x"] * 100)
    assert silent["events"] == [] and silent["firing_rate"] == 0
    assert len(raster.draw(silent).axes[0].get_xticks()) < 100, "100 tokens have no room for their text"
