"""Curves show their points, and the mean over depths is weighted as it says."""

from __future__ import annotations

import pytest

from spikelm.plots import canvas, curves
from spikelm.report.tasks import by_length


def test_points_stand_where_they_are() -> None:
    figure = curves.draw(
        {"$a": [(1, 3.0, 0.5), (8, 2.0, None)], "b": [(4, 1.0, 0.0)]}, x="tokens", y="nats", title="t"
    )
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "tokens" and axes.get_ylabel() == "nats"
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 8], [4]]
    assert [list(line.get_ydata()) for line in axes.lines] == [[3.0, 2.0], [1.0]]
    shade = axes.collections[0].get_paths()[0].vertices
    assert {tuple(row) for row in shade.tolist()} >= {(1.0, 2.5), (1.0, 3.5), (8.0, 2.0)}
    assert axes.get_legend().get_texts()[0].get_text() == r"\$a"
    assert canvas.rendered(figure, "svg")


def test_mean_over_depths_by_hand() -> None:
    rows = [
        {"length": 128, "depth": 0.0, "accuracy": 1.0, "stderr": 0.1, "n": 10},
        {"length": 128, "depth": 0.5, "accuracy": 0.5, "stderr": 0.2, "n": 30},
        {"length": 64, "depth": None, "accuracy": 0.25, "stderr": None, "n": 4},
        {"length": None, "depth": 0.5, "accuracy": 0.5, "stderr": 0.2, "n": 30},
    ]
    # (10 + 15) / 40; sqrt((10 x 0.1)^2 + (30 x 0.2)^2) / 40.
    assert by_length(rows) == [(64.0, 0.25, None), (128.0, 0.625, pytest.approx(37**0.5 / 40))]
