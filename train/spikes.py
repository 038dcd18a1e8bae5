"""What a meter saw, as a trainer needs it: one rate, a short summary, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SILENT = 0.999
SATURATED = 0.95


def spike_rate(summary: Mapping[str, Any]) -> float | None:
    """One figure for a progress bar: how much of what could fire does.

    Firing rate of the spiking projections' inputs, weighted by multiply-accumulates; for a model whose spikes
    enter the residual stream only, the firing rate of those neurons; None where nothing spikes.
    """
    macs = fired = 0.0
    for entry in summary["projections"].values():
        if entry["spiking"]:
            weight = float(entry["in_features"] * entry["out_features"])
            macs += weight
            fired += weight * float(entry["firing_rate"])
    if macs:
        return fired / macs
    for entry in summary["neurons"].values():
        macs += entry["features"]
        fired += entry["features"] * float(entry["firing_rate"])
    return fired / macs if macs else None


def brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Totals and, per spiking projection or neuron, firing rate, mean count and channels that never fired."""
    return {
        "spike_rate": spike_rate(summary),
        "silent": float(summary["total"]["silent"]),
        "projections": {
            path: {key: round(float(entry[key]), 6) for key in ("firing_rate", "mean_count", "never_fired")}
            for path, entry in _spiking(summary)
        },
    }


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
