"""What a meter saw, as a trainer needs it: one rate, a short summary, and warnings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

SILENT = 0.999
SATURATED = 0.95
_LAYER = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_EXPERT = re.compile(r"(\.experts\.)\d+(\.)")


def spike_rate(summary: Mapping[str, Any]) -> float | None:
    """One figure for a progress bar: how much of what could fire does.

    Firing rate of the spiking projections' inputs, weighted by multiply-accumulates; for a model whose spikes
    enter the residual stream only, the firing rate of those neurons; None where nothing spikes.
    """
    macs = fired = 0.0
    for entry in summary["projections"].values():
        if entry["spiking"]:
            weight = float(entry["in_features"] * entry["out_features"] * entry["tokens"])
            macs += weight
            fired += weight * float(entry["firing_rate"])
    if macs:
        return fired / macs
    for entry in summary["neurons"].values():
        macs += entry["features"]
        fired += entry["features"] * float(entry["firing_rate"])
    return fired / macs if macs else None


FIGURES = ("firing_rate", "silent", "mean_count", "at_cap", "never_fired")


def brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Totals, and the same figures per layer and per spiking projection or neuron.

    The experts of a mixture are put together: ``blocks.0.channel.experts.*.up`` stands for all of them.

    Returns:
        ``spike_rate`` (:func:`spike_rate`); ``silent``: share of zero inputs, over all projections;
        ``mean_count`` (mean absolute count), ``at_cap`` (share of counts at the cap) and ``never_fired``
        (share of channels without one spike) over what :func:`spike_rate` is over, None for a twin;
        ``layers``: number of the block -> :data:`FIGURES`; ``projections``: path -> :data:`FIGURES`.
    """
    entries = dict(_spiking(summary))
    layers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for path, entry in entries.items():
        if (found := _LAYER.search(path)) is not None:
            layers.setdefault(found[1], {})[path] = entry
    total = together(entries.values())
    return {
        "spike_rate": spike_rate(summary),
        "silent": float(summary["total"]["silent"]),
        **{key: total[key] if total else None for key in ("mean_count", "at_cap", "never_fired")},
        "layers": {index: together(layers[index].values()) for index in sorted(layers, key=int)},
        "projections": {
            path: together(found) if "*" in path else {key: _figure(found[0], key) for key in FIGURES}
            for path, found in _by_kind(entries).items()
        },
    }


def together(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """:data:`FIGURES` of several projections or neurons.

    Where one of them is a projection, only projections count, weighted by the multiply-accumulates they did;
    otherwise neurons, by their channels. Never-fired channels are weighted by channels. An expert that saw
    no token counts nowhere. Empty without any.
    """
    entries = [entry for entry in entries if entry["tokens"]]
    projections = [entry for entry in entries if "out_features" in entry]
    found: dict[str, float] = {}
    counted = projections or entries
    for key in FIGURES if counted else ():
        weights = [
            _channels(e) * (1 if key == "never_fired" or not projections else e["out_features"] * e["tokens"])
            for e in counted
        ]
        share = sum(w * float(e.get(key, 0.0)) for w, e in zip(weights, counted, strict=True)) / sum(weights)
        found[key] = round(share, 6)
    return found


def _by_kind(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Entries by path, with those of a mixture's experts under one."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for path, entry in entries.items():
        found.setdefault(_EXPERT.sub(r"\1*\2", path), []).append(entry)
    return found


def _channels(entry: Mapping[str, Any]) -> int:
    return int(entry["in_features"] if "in_features" in entry else entry["features"])


def _figure(entry: Mapping[str, Any], key: str) -> float:
    """A rounded figure; neurons outside projections have no cap."""
    return round(float(entry.get(key, 0.0)), 6)


def _spiking(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Spiking projections, then neurons outside projections."""
    inside = [(path, entry) for path, entry in summary["projections"].items() if entry["spiking"]]
    return inside + list(summary["neurons"].items())


class SpikeWarnings:
    """Finds neurons that do nothing: silent ones, and binary ones that always fire.

    A warning is given once per projection, when two readings in a row show it (the first readings of a run
    may be extreme).
    """

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], bool] = {}
        self._said: set[tuple[str, str]] = set()

    def check(self, summary: Mapping[str, Any]) -> list[str]:
        """Warnings that this reading adds."""
        found = []
        for path, entry in _spiking(summary):
            if not entry["tokens"]:  # an expert that no token was sent to
                continue
            rate, silent = float(entry["firing_rate"]), float(entry["silent"])
            binary = abs(float(entry["mean_count"]) - rate) < 1e-9
            cases = {
                "silent": (
                    silent > SILENT,
                    f"{path} is silent: {silent:.2%} of its spike counts are zero; "
                    "lower its threshold or dead zone, or give it a rate_target",
                ),
                "saturated": (
                    binary and rate > SATURATED,
                    f"{path} is saturated: it fires {rate:.1%} of the time, so its spikes say nothing; "
                    "raise its threshold, or give it a rate_target",
                ),
            }
            for case, (now, text) in cases.items():
                key = (path, case)
                if now and self._before.get(key) and key not in self._said:
                    self._said.add(key)
                    found.append(text)
                self._before[key] = now
        return found
