"""Estimated energy: operations and bytes times prices, and the quantised network beside it.

The quantised network has the same weights and shapes, and in place of counts of up to T activations of
b = ceil(log2(T + 1)) bits, one more for a sign (Yan et al., arXiv 2409.08290): what a T-step spiking network
can say, it says in one step. Its zeros are those of the counts, so it may skip what the spiking one skips.
The encoding of ``adaptive`` is its quantiser too; other input neurons are replaced by one multiplication, one
rounding and two comparisons per input. A network that quantises its activations would not keep float weights:
``quantised_int8`` is the same network with int8 weights in every projection with spikes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikelm.codings.base import build_coding
from spikelm.energy.census import Census
from spikelm.energy.counts import Operations
from spikelm.energy.prices import OTHER, Table

QUANTISER = Operations(multiplications=1, roundings=1, comparisons=2)
"""A quantised activation that is no adaptive count, per input."""


def compute(found: Census, table: Table) -> dict[str, Any]:
    """Picojoules of the arithmetic of one token.

    Returns:
        ``dense``, ``effective``, ``spikes`` (coding -> picojoules, None where it does not apply),
        ``quantised_dense``, ``quantised_effective``, ``quantised_int8``, and ``other``: the part of each of
        them that is not in the products of projections.
    """
    rest = sum((own for kinds in found.parts.values() for own in kinds.values()), Operations())
    fixed, mac, add = table.elementary(rest), table.mac(OTHER), table.add(OTHER)
    other = {
        "dense": fixed + rest.dense_macs * mac,
        "effective": fixed + rest.effective_macs * mac,
        "spikes": fixed + rest.macs_without_spikes * mac + rest.accumulates * add,
    }
    other["quantised"] = other["effective"] + _quantisers(found, table)
    dense = effective = quantised = quantised_all = quantised_int8 = 0.0
    for entry in found.synapses:
        price, own = table.mac(entry.arithmetic), entry.operations()
        dense += own.dense_macs * price
        effective += own.effective_macs * price
        cheap = table.quantised_mac(entry.arithmetic, entry.activation_bits) if entry.spiking else price
        quantised += own.effective_macs * cheap
        quantised_all += own.dense_macs * cheap
        small = table.quantised_mac("int8", entry.activation_bits) if entry.spiking else price
        quantised_int8 += own.effective_macs * small
    sent = found.codings()
    spikes = {name: _sent(found, table, name, one, other["spikes"]) for name, one in sent.items()}
    return {
        "dense": dense + other["dense"],
        "effective": effective + other["effective"],
        "spikes": spikes,
        "quantised_dense": quantised_all + other["quantised"],
        "quantised_effective": quantised + other["quantised"],
        "quantised_int8": quantised_int8 + other["quantised"],
        "other": other,
    }


def _quantisers(found: Census, table: Table) -> float:
    """What quantising costs more (or less) than the input neurons that it replaces."""
    change = 0.0
    for entry in found.synapses:
        if entry.spiking and not entry.stateless_counts:
            neuron = sum(found.parts.get(f"{entry.path}.neuron", {}).values(), Operations())
            mac = table.mac(OTHER)
            change -= table.elementary(neuron) + neuron.effective_macs * mac
            change += table.elementary(entry.calls * entry.inputs * QUANTISER)
    return change


def _sent(found: Census, table: Table, name: str, summary: Mapping[str, Any], other: float) -> float | None:
    """Picojoules if the counts are sent in a coding; projections without spikes multiply what is not zero."""
    if "not_applicable" in summary:
        return None
    total, coding = other, build_coding(name)
    for entry in found.synapses:
        if not entry.spiking:
            total += entry.operations().effective_macs * table.mac(entry.arithmetic)
            continue
        one = entry.coding(coding)
        total += (one["accumulates"] + one["plane_additions"]) * table.add(entry.arithmetic)
    return total


def memory(moved: Mapping[str, Any], table: Table, on_chip_bytes: int) -> dict[str, dict[str, float]]:
    """Picojoules of what a token moves: ``dense`` and ``kernels`` -> low and high price of DRAM.

    Args:
        moved: an entry of ``bytes``.
        table: prices.
        on_chip_bytes: size of the on-chip memory, which sets its price.
    """
    inside, (low, high) = table.on_chip(on_chip_bytes), table.dram
    result = {}
    for name, prefix in (("dense", "dense_"), ("kernels", "")):
        dram, chip = moved[f"{prefix}dram_per_token"], moved[f"{prefix}on_chip_per_token"]
        result[name] = {"low": dram * low + chip * inside, "high": dram * high + chip * inside}
    return result


def estimate(
    found: Census, moved: Mapping[str, Mapping[str, Any]], table: Table, on_chip_bytes: int
) -> dict[str, Any]:
    """One entry of ``energy`` in the JSON, see docs/energy.md.

    Args:
        found: operations.
        moved: batch -> bytes.
        table: prices.
        on_chip_bytes: size of the on-chip memory.
    """
    arithmetic = compute(found, table)
    memories = {name: memory(one, table, on_chip_bytes) for name, one in moved.items()}
    return {
        "compute": arithmetic,
        "memory": memories,
        "total": {name: _with_memory(arithmetic, one) for name, one in memories.items()},
    }


def _with_memory(arithmetic: Mapping[str, Any], moved: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    def both(picojoules: float | None, what: str) -> dict[str, float] | None:
        if picojoules is None:
            return None
        return {edge: picojoules + moved[what][edge] for edge in ("low", "high")}

    return {
        "dense": both(arithmetic["dense"], "dense"),
        "effective": both(arithmetic["effective"], "kernels"),
        "spikes": {name: both(value, "kernels") for name, value in arithmetic["spikes"].items()},
        "quantised_dense": both(arithmetic["quantised_dense"], "dense"),
        "quantised_effective": both(arithmetic["quantised_effective"], "kernels"),
    }


def bit_budget(found: Census) -> dict[str, Any]:
    """Bit budget = time steps x weight bits x activation bits, of every coding and of the quantised network.

    Shen et al., "Are conventional SNNs really efficient? A perspective from network quantization" (CVPR 2024,
    arXiv 2311.10802). Means over the projections with spikes, weighted by their dense multiply-accumulates.
    An event of an alphabet of two letters is one bit, of three letters two.
    """
    spiking = [entry for entry in found.synapses if entry.spiking and entry.calls]
    weight = sum(entry.dense_macs for entry in spiking)
    result: dict[str, Any] = {}
    for name, summary in found.codings().items():
        if "not_applicable" in summary or not weight:
            result[name] = None
            continue
        coding = build_coding(name)
        letters = (len(coding.alphabet) - 1).bit_length()
        steps = budget = quantised = bits = weights = 0.0
        for entry in spiking:
            share, taken = entry.dense_macs / weight, coding.steps(entry.largest)
            steps += share * taken
            weights += share * entry.weight_bits
            bits += share * entry.activation_bits
            budget += share * taken * entry.weight_bits * letters
            quantised += share * entry.weight_bits * entry.activation_bits
        result[name] = {
            "steps": steps,
            "weight_bits": weights,
            "activation_bits": letters,
            "spiking": budget,
            "quantised_bits": bits,
            "quantised": quantised,
        }
    return result
