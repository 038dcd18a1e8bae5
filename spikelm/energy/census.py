"""The operations of a whole model: projections as measured, everything else by formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spikelm.codings.base import build_coding
from spikelm.energy.counts import KINDS, Operations
from spikelm.energy.operations import counted
from spikelm.energy.reading import Reading
from spikelm.energy.synapses import Synapses
from spikelm.model import SpikeLM
from spikelm.recurrence import Part
from spikelm.registry import codings

MODEL = "model"
"""Path under which the model's own operations stand: embedding and norms."""


@dataclass(frozen=True, kw_only=True)
class Census:
    """Operations per token of a model.

    Attributes:
        synapses: every projection.
        parts: path of a part -> kind -> operations, calls included; projections with what they do besides
            the product.
    """

    synapses: tuple[Synapses, ...]
    parts: dict[str, dict[str, Operations]]

    def by_kind(self) -> dict[str, Operations]:
        """Sums over the model of every kind that occurs."""
        found: dict[str, Operations] = {}
        for kinds in self.parts.values():
            for kind, own in kinds.items():
                found[kind] = found.get(kind, Operations()) + own
        for entry in self.synapses:
            found[entry.kind] = found.get(entry.kind, Operations()) + entry.operations()
        order = [*KINDS, *(kind for kind in found if kind not in KINDS)]
        return {kind: found[kind] for kind in order if kind in found}

    def total(self) -> Operations:
        """The sum of all."""
        return sum(self.by_kind().values(), Operations())

    def codings(self) -> dict[str, dict[str, Any]]:
        """Every coding over all projections with spikes; not applicable where it is not for one of them."""
        spiking = [entry for entry in self.synapses if entry.spiking]
        inputs = sum(entry.calls * entry.inputs for entry in spiking)
        result: dict[str, dict[str, Any]] = {}
        for name in codings.names() if spiking else []:
            coding = build_coding(name)
            found = [entry.coding(coding) for entry in spiking]
            refused = next((one for one in found if "not_applicable" in one), None)
            if refused is not None:
                result[name] = refused
                continue
            pairs = list(zip(spiking, found, strict=True))
            slots = sum(entry.calls * entry.inputs * one["micro_steps"] for entry, one in pairs)
            events = sum(entry.calls * entry.inputs * one["events_per_input"] for entry, one in pairs)
            result[name] = {
                "micro_steps": max(one["micro_steps"] for one in found),
                "events_per_input": events / inputs if inputs else 0.0,
                "sparsity": 1.0 - events / slots if slots else 1.0,
                "accumulates": sum(one["accumulates"] for one in found),
                "plane_additions": sum(one["plane_additions"] for one in found),
            }
        return result

    def projections_over_dense(self) -> float:
        """What spikes leave of the projections' multiply-accumulates: those without spikes count in full.

        Zeros that an activation leaves (relu^2) are the continuous twin's too, and no kernel here skips them.
        """
        left = sum(
            entry.operations().effective_macs if entry.spiking else entry.dense_macs
            for entry in self.synapses
        )
        return self._over_dense(left)

    def effective_over_dense(self) -> float:
        """What is left if every zero is skipped, whatever made it."""
        return self._over_dense(sum(entry.operations().effective_macs for entry in self.synapses))

    def _over_dense(self, macs: float) -> float:
        dense = sum(entry.dense_macs for entry in self.synapses)
        return macs / dense if dense else 0.0

    def spiking_share(self) -> float:
        """Share of the projections' dense multiply-accumulates whose input is spikes."""
        return self._over_dense(sum(entry.dense_macs for entry in self.synapses if entry.spiking))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as docs/energy.md lays them out."""
        return {
            "total": {
                **self.total().to_dict(),
                "spiking_share": self.spiking_share(),
                "silent": 1.0 - self.effective_over_dense(),
            },
            "by_kind": {kind: own.to_dict() for kind, own in self.by_kind().items()},
            "projections": {entry.path: entry.to_dict() for entry in self.synapses},
            "parts": {
                path: {kind: own.to_dict() for kind, own in kinds.items()}
                for path, kinds in self.parts.items()
            },
            "codings": self.codings(),
            "projections_over_dense": self.projections_over_dense(),
            "effective_over_dense": self.effective_over_dense(),
        }


def census(model: SpikeLM, reading: Reading) -> Census:
    """Ask every part of a model what it does.

    Raises:
        ConfigError: a part has no formula.
    """
    parts: dict[str, dict[str, Operations]] = {}
    shares = calls(model, reading)
    for path, module in model.named_modules():
        if module is not model and not isinstance(module, Part):
            continue
        own = counted(module, reading.activity)
        if own:
            parts[path or MODEL] = {kind: shares[path] * found for kind, found in own.items()}
    return Census(synapses=reading.synapses, parts=parts)


def calls(model: SpikeLM, reading: Reading) -> dict[str, float]:
    """Path of every module -> share of the tokens that reach it.

    A part is reached as often as the projections inside it at most are; one without any as often as what it
    is in.
    """
    inside: dict[str, float] = {}
    for entry in reading.synapses:
        path = entry.path
        while True:
            inside[path] = max(inside.get(path, 0.0), entry.calls)
            if not path:
                break
            path = path.rpartition(".")[0]
    shares: dict[str, float] = {}
    for path, _ in model.named_modules():
        shares[path] = inside[path] if path in inside else shares[path.rpartition(".")[0]]
    shares[""] = 1.0
    return shares
