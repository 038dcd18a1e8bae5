"""Pareto: what a model costs per token against how well it predicts, from records of both.

Three costs that are never mixed: operations (multiply-accumulates without a zero among their operands),
bytes (from and to memory, batch 1), and measured seconds. Less is better on either axis; a model is on the
front if no other is at least as good in both and better in one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spikelm.errors import ConfigError, DataError, nearest
from spikelm.plots import canvas
from spikelm.plots.canvas import LIGHT, Theme
from spikelm.plots.records import check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = {
    "operations": "multiply-accumulates per token without a zero operand",
    "bytes": "bytes from and to memory per token (batch 1)",
    "seconds": "seconds per token, measured",
}
"""Name of a cost -> what it is."""
_SPREAD = 20
"""From this ratio of the dearest to the cheapest on, a cost has a logarithmic axis."""


def pareto(records: Sequence[Mapping[str, Any]], figure: str | None = None) -> dict[str, Any]:
    """Bits per byte beside costs, of every checkpoint that has both.

    Args:
        records: of kinds ``eval`` and ``energy`` (others are passed over); two of them belong together where
            the SHA-256 of the weights and the configuration agree, and neither or both were measured with
            the neurons off.
        figure: label of the figure (``carried``, ``disjoint@1024``, ...); the first one that every model has
            if None.

    Returns:
        JSON values: ``figure``; ``models``, a list of {label, sha256, bits_per_byte, stderr, operations,
        dense_macs, accumulates, bytes, seconds} (None where not measured); ``fronts``, cost -> labels of the
        models on its front; ``unmatched``, labels with one half only.

    Raises:
        DataError: no checkpoint has both halves, or the models were measured on different texts.
        ConfigError: a figure that not every model has.
    """
    check(records)
    quality, texts = _quality(records)
    costs = _costs(records)
    both = [key for key in quality if key in costs]
    unmatched = [quality[key]["label"] for key in quality if key not in costs]
    unmatched += [entry["label"] for key, entry in costs.items() if key not in quality]
    if not both:
        raise DataError(
            "no checkpoint has a record of its bits per byte (spikelm eval --json) and one of its costs "
            "(spikelm energy --json); give both records of the same checkpoint"
        )
    if len({texts[key] for key in both}) > 1:
        raise DataError(
            "the models were measured on different texts, so their bits per byte do not compare; "
            "measure them with one spikelm eval call"
        )
    shared = [
        label for label in quality[both[0]]["figures"] if all(label in quality[k]["figures"] for k in both)
    ]
    if figure is not None and figure not in shared:
        raise ConfigError(nearest("figure", figure, shared))
    if not shared:
        raise DataError("the models have no figure in common; measure them with the same --mode and --length")
    chosen = figure or shared[0]
    models = []
    for key in both:
        found = quality[key]["figures"][chosen]
        models.append(
            {
                "label": quality[key]["label"],
                "sha256": key[0],
                "bits_per_byte": _number(found.get("bits_per_byte")),
                "stderr": _number(found.get("stderr_bits_per_byte")),
                **costs[key]["costs"],
            }
        )
    fronts = {cost: front((m["label"], m[cost], m["bits_per_byte"]) for m in models) for cost in COSTS}
    return {"figure": chosen, "models": models, "fronts": fronts, "unmatched": unmatched}


def front(points: Iterable[tuple[str, float | None, float | None]]) -> list[str]:
    """Labels of the points (label, cost, loss) that no other beats, cheap ones first; None is left out."""
    known = [(label, x, y) for label, x, y in points if x is not None and y is not None]
    best = [
        (x, y, label)
        for label, x, y in known
        if not any((a <= x and b <= y) and (a < x or b < y) for _, a, b in known)
    ]
    return [label for *_, label in sorted(best)]


_Key = tuple[str, str, bool]


def _key(record: Mapping[str, Any], label: str) -> _Key | None:
    own = same_model((record.get("checkpoints") or {}).get(label) or {})
    return None if own is None else (*own, bool((record.get("arguments") or {}).get("twin")))


def same_model(identity: Mapping[str, Any]) -> tuple[str, str] | None:
    """What two records of one model share: the hash of its weights, and its configuration as text.

    The weights alone do not say it: a model and its twin may have the same ones.

    Args:
        identity: of a checkpoint in a record (:func:`spikelm.evaluation.record.identity`).
    """
    sha256 = identity.get("sha256")
    return None if not sha256 else (str(sha256), json.dumps(identity.get("config"), sort_keys=True))


def _quality(records: Sequence[Mapping[str, Any]]) -> tuple[dict[_Key, dict[str, Any]], dict[_Key, str]]:
    found: dict[_Key, dict[str, Any]] = {}
    texts: dict[_Key, str] = {}
    taken: set[str] = set()
    for record in records:
        if record.get("kind") != "eval":
            continue
        for label, model in (record["results"].get("models") or {}).items():
            key = _key(record, label)
            if key is not None and model.get("figures"):
                name = unique(label, taken)
                found[key] = {"label": name, "figures": model["figures"]}
                texts[key] = str((record.get("data") or {}).get("sha256"))
    return found, texts


def _costs(records: Sequence[Mapping[str, Any]]) -> dict[_Key, dict[str, Any]]:
    found: dict[_Key, dict[str, Any]] = {}
    for record in records:
        if record.get("kind") != "energy":
            continue
        for label, model in (record["results"].get("models") or {}).items():
            key = _key(record, label)
            if key is not None:
                found[key] = {"label": label, "costs": costs_of(model)}
    return found


def costs_of(model: Mapping[str, Any]) -> dict[str, float | None]:
    """Operations, bytes and seconds per token of one model of an energy record; None where not measured."""
    total = (model.get("operations") or {}).get("total") or {}
    return {
        "operations": _number(total.get("effective_macs")),
        "dense_macs": _number(total.get("dense_macs")),
        "accumulates": _number(total.get("accumulates")),
        "bytes": _number(((model.get("bytes") or {}).get("batch_1") or {}).get("dram_per_token")),
        "seconds": _number((model.get("measured") or {}).get("seconds_per_token")),
    }


def unique(label: str, taken: set[str]) -> str:
    """A label that nothing else has: ``model``, ``model (2)``, ...; it is added to ``taken``."""
    name, number = label, 2
    while name in taken:
        name, number = f"{label} ({number})", number + 1
    taken.add(name)
    return name


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def draw(numbers: Mapping[str, Any], *, theme: Theme = LIGHT) -> Figure:
    """One panel for each cost; the front is joined by a line, bars are one standard error."""
    models = numbers["models"]
    labels = [model["label"] for model in models]
    with canvas.on(theme):
        figure = canvas.blank(10.0, 3.9)
        handles: dict[str, Any] = {}
        for axes, (cost, name) in zip(figure.subplots(1, 3, sharey=True), COSTS.items(), strict=True):
            _panel(axes, numbers, labels, cost, handles)
            axes.set_xlabel(name.replace(" per token", "\nper token", 1), fontsize=9)
            axes.grid(alpha=0.4)
        figure.axes[0].set_ylabel(f"bits per byte ({canvas.plain(numbers['figure'])})")
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _panel(
    axes: Any, numbers: Mapping[str, Any], labels: Sequence[str], cost: str, handles: dict[str, Any]
) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    shown = [m for m in numbers["models"] if m[cost] is not None and m["bits_per_byte"] is not None]
    if not shown:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        return
    for model in shown:
        index = labels.index(model["label"])
        bar = axes.errorbar(
            model[cost],
            model["bits_per_byte"],
            yerr=model["stderr"],
            fmt=canvas.MARKERS[index % len(canvas.MARKERS)],
            color=canvas.COLOURS[index % len(canvas.COLOURS)],
            capsize=3,
        )
        handles.setdefault(canvas.plain(model["label"]), bar)
    on_front = [m for name in numbers["fronts"][cost] for m in shown if m["label"] == name]
    axes.plot(
        [m[cost] for m in on_front], [m["bits_per_byte"] for m in on_front], color="#8a8f98", linewidth=0.9
    )
    costs = [model[cost] for model in shown]
    axes.margins(x=0.25, y=0.2)
    if min(costs) > 0 and max(costs) >= _SPREAD * min(costs):
        axes.set_xscale("log")
        return
    # On less than a decade a logarithmic axis has no room for its labels.
    axes.set_xlim(0, 1.15 * max(costs) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter())
