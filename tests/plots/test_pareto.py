"""Which records belong together, which models are on the front, and what is drawn of them."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest

from spikelm.errors import ConfigError, DataError
from spikelm.plots import canvas
from spikelm.plots.pareto import draw, front, pareto


def evaluation(bits: dict[str, float | None], *, text: str = "t", **arguments: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": "eval",
        "arguments": arguments,
        "checkpoints": {label: {"sha256": f"hash-{label}", "path": label} for label in bits},
        "data": {"sha256": text},
        "results": {
            "models": {
                label: {
                    "figures": {
                        "disjoint@64": {"bits_per_byte": 9.0, "stderr_bits_per_byte": None},
                        "carried": {"bits_per_byte": value, "stderr_bits_per_byte": 0.01},
                    }
                }
                for label, value in bits.items()
            }
        },
    }


def energy(
    costs: dict[str, tuple[float | None, float | None, float | None]], **arguments: Any
) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": "energy",
        "arguments": arguments,
        "checkpoints": {label: {"sha256": f"hash-{label}", "path": label} for label in costs},
        "results": {
            "models": {
                label: {
                    "operations": {
                        "total": {"dense_macs": 100.0, "effective_macs": macs, "accumulates": 7.0}
                    },
                    "bytes": {"batch_1": {"dram_per_token": size}},
                    "measured": {"seconds_per_token": seconds},
                }
                for label, (macs, size, seconds) in costs.items()
            }
        },
    }


def test_front_against_its_definition() -> None:
    """Every set of points on a small grid: on the front is what no other point beats."""
    grid = list(itertools.product((1.0, 2.0, 3.0), repeat=2))
    for size in (1, 2, 3, 4):
        for points in itertools.combinations(grid, size):
            named = {f"{x}-{y}": (x, y) for x, y in points}
            beaten = {
                name
                for name, (x, y) in named.items()
                for a, b in points
                if a <= x and b <= y and (a, b) != (x, y)
            }
            found = front((name, x, y) for name, (x, y) in named.items())
            assert set(found) == set(named) - beaten
            assert [named[name][0] for name in found] == sorted(named[name][0] for name in found)
    assert front([("a", 1.0, 1.0), ("b", 1.0, 1.0), ("c", None, 0.0), ("d", 0.0, None)]) == ["a", "b"]


def test_numbers_by_hand() -> None:
    found = pareto(
        [
            evaluation({"cheap": 2.0, "good": 1.5, "bad": 2.5, "alone": 1.0}),
            energy({"good": (9.0, 90.0, None), "cheap": (3.0, 30.0, None), "bad": (5.0, 20.0, None)}),
            energy({"unmeasured": (1.0, 1.0, 1.0)}),
            {"kind": "tasks", "results": {"models": {}}},
        ],
        "carried",
    )
    assert found["figure"] == "carried"
    assert found["models"][0] == {
        "label": "cheap",
        "sha256": "hash-cheap",
        "bits_per_byte": 2.0,
        "stderr": 0.01,
        "operations": 3.0,
        "dense_macs": 100.0,
        "accumulates": 7.0,
        "bytes": 30.0,
        "seconds": None,
    }
    assert found["fronts"] == {
        "operations": ["cheap", "good"],
        "bytes": ["bad", "cheap", "good"],
        "seconds": [],
    }
    assert found["unmatched"] == ["alone", "unmeasured"]
    json.dumps(found, allow_nan=False)


def test_halves_belong_together_by_their_weights() -> None:
    """Labels may differ between records; a twin measured from the same weights is another model."""
    spiking, twin = evaluation({"model": 2.0}), evaluation({"model": 1.9}, twin=True)
    costs = energy({"model": (3.0, 3.0, 3.0)})
    costs["checkpoints"] = {"renamed": costs["checkpoints"]["model"]}
    costs["results"]["models"] = {"renamed": costs["results"]["models"]["model"]}
    found = pareto([spiking, twin, costs])
    assert [(m["label"], m["bits_per_byte"]) for m in found["models"]] == [("model", 9.0)]
    assert found["unmatched"] == ["model (2)"]
    assert found["figure"] == "disjoint@64", "the first one that all have"


def test_equal_weights_are_not_enough() -> None:
    """A model and its twin may have the same weights: then their configurations tell them apart."""
    quality = evaluation({"spiking": 2.0, "twin": 1.5})
    costs = energy({"twin": (9.0, 9.0, 9.0), "spiking": (1.0, 1.0, 1.0)})
    for record in (quality, costs):
        for label, identity in record["checkpoints"].items():
            identity |= {"sha256": "same", "config": {"neuron": label, "size": 4}}
    models = pareto([quality, costs], "carried")["models"]
    found = {m["label"]: (m["bits_per_byte"], m["operations"]) for m in models}
    assert found == {"spiking": (2.0, 1.0), "twin": (1.5, 9.0)}


@pytest.mark.parametrize("records", [[], [evaluation({"a": 1.0})], [energy({"a": (1.0, 1.0, 1.0)})]])
def test_one_half_is_refused(records: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="give both records of the same checkpoint"):
        pareto(records)


def test_what_does_not_compare_is_refused() -> None:
    costs = energy({"a": (1.0, 1.0, 1.0), "b": (2.0, 2.0, 2.0)})
    with pytest.raises(DataError, match="different texts"):
        pareto([evaluation({"a": 1.0}), evaluation({"b": 1.0}, text="other"), costs])
    with pytest.raises(ConfigError, match="unknown figure 'carrid'; did you mean 'carried'"):
        pareto([evaluation({"a": 1.0}), costs], "carrid")
    other = evaluation({"b": 1.0})
    other["results"]["models"]["b"]["figures"] = {"strided@8/4": {"bits_per_byte": 1.0}}
    with pytest.raises(DataError, match="no figure in common"):
        pareto([evaluation({"a": 1.0}), other, costs])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"kind": "poem", "results": {"models": {}}}, "record 1 has kind 'poem'"),
        ({"kind": "eval", "results": []}, r"record 1 \(eval\) has no results"),
        ({"kind": "energy", "results": {"models": {"a": 3}}}, "has no results for each model"),
    ],
)
def test_records_of_another_shape_are_refused(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pareto([broken])


def test_gaps_are_no_numbers() -> None:
    """NaN, null, text and whole sections that are missing count as not measured."""
    quality = evaluation({"a": float("nan"), "b": 1.0, "c": 2.0})
    costs = energy({"a": (1.0, 1.0, 1.0), "b": (float("inf"), None, 0.0), "c": (5.0, 5.0, 500.0)})
    del costs["results"]["models"]["c"]["bytes"]
    costs["results"]["models"]["b"]["operations"]["total"]["accumulates"] = "many"
    found = pareto([quality, costs], "carried")
    assert found["fronts"] == {"operations": ["c"], "bytes": [], "seconds": ["b"]}
    a, b, c = found["models"]
    assert a["bits_per_byte"] is None and b["operations"] is None and b["accumulates"] is None
    assert c["bytes"] is None
    json.dumps(found, allow_nan=False)
    figure = draw(found)
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["not measured"]
    assert canvas.rendered(figure, "png")


def test_picture() -> None:
    found = pareto(
        [evaluation({"$a": 2.0, "b$": 1.5}), energy({"$a": (1.0, 30.0, 1e-3), "b$": (1000.0, 31.0, 2e-3)})],
        "carried",
    )
    figure = draw(found)
    operations, size, seconds = figure.axes
    # Over more than a decade the axis is logarithmic, else it begins at zero.
    assert operations.get_xscale() == "log" and size.get_xscale() == "linear" and seconds.get_xlim()[0] == 0
    joined = operations.lines[-1]
    assert list(joined.get_xdata()) == [1.0, 1000.0] and list(joined.get_ydata()) == [2.0, 1.5]
    assert "bits per byte (carried)" in operations.get_ylabel() and "per token" in operations.get_xlabel()
    assert canvas.rendered(figure, "svg")
    before = copy.deepcopy(found)
    draw(found)
    assert found == before
