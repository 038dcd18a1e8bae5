"""Tables of ``spikelm energy``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from spikelm.cli._common import human_bytes, human_count

COLUMNS = ("dense_macs", "effective_macs", "accumulates")
SINGLE = {
    "multiplications": "mul",
    "additions": "add",
    "comparisons": "cmp",
    "roundings": "round",
    "divisions": "div",
    "roots": "sqrt",
    "exponentials": "exp",
}
"""Operations that are no multiply-accumulates, and their headings."""


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def of_model(label: str, model: Mapping[str, Any], shown: str, text: str) -> Iterator[Table]:
    """All tables of one model.

    Args:
        label: its name.
        model: its entry of the results.
        shown: price table.
        text: name of what was read.
    """
    yield _operations(
        f"{label}: operations per token, {model['tokens']:,} tokens of {text}", model["operations"]
    )
    yield _projections(model["operations"])
    if model["operations"]["codings"]:
        yield _codings(model["operations"]["codings"], model["bit_budget"])
    yield _bytes(model["bytes"])
    yield _energy(model["energy"][shown], shown)
    yield _measured(model["measured"])


def _operations(title: str, operations: Mapping[str, Any]) -> Table:
    table = _table(title, "kind", "dense MACs", "effective", "accumulates", *SINGLE.values())
    rows = [*operations["by_kind"].items(), ("total", operations["total"])]
    for kind, own in rows:
        table.add_row(kind, *(human_count(own[name]) for name in (*COLUMNS, *SINGLE)))
    return table


def _projections(operations: Mapping[str, Any]) -> Table:
    """One row for the projections of one name in all blocks and experts: sums, and means of shares."""
    table = _table(
        "projections: sums over those of a name, means of shares; never: channels that never fired; "
        "max: largest count; events: matrices laid out event-driven",
        "name",
        "matrices",
        "weights",
        "spikes",
        "dense",
        "effective",
        "accum.",
        "silent",
        "never",
        "max",
        "events",
    )
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for path, one in operations["projections"].items():
        shape = f"{one['in_features']}x{one['out_features']}"
        groups.setdefault((re.sub(r"\.\d+(?=\.)", ".*", path), shape, one["weights"]), []).append(one)
    for (name, shape, weights), alike in groups.items():
        spiking = alike[0]["spiking"]
        width = sum(one["in_features"] for one in alike)
        table.add_row(
            name,
            f"{len(alike)} {shape}",
            weights,
            alike[0]["neuron"] if spiking else "no",
            *(human_count(sum(one[key] for one in alike)) for key in COLUMNS),
            f"{sum(one['silent'] for one in alike) / len(alike):.1%}",
            f"{sum(one['silent_channels'] for one in alike) / width:.1%}",
            str(max(one["largest_count"] for one in alike)) if spiking else "-",
            str(sum(one["layout"] == "in_out" for one in alike)),
        )
    return table


def _codings(codings: Mapping[str, Any], budgets: Mapping[str, Any]) -> Table:
    table = _table(
        "codings over all projections with spikes (-: no code for negative counts), windows as long as the "
        "largest count needs",
        "coding",
        "micro-steps",
        "events per input",
        "sparsity",
        "accumulates",
        "plane additions",
        "bit budget",
        "quantised",
    )
    for name, one in codings.items():
        if "not_applicable" in one:
            table.add_row(name, *["-"] * 7)
            continue
        budget = budgets[name]
        table.add_row(
            name,
            str(one["micro_steps"]),
            f"{one['events_per_input']:.4f}",
            f"{one['sparsity']:.4f}",
            human_count(one["accumulates"]),
            human_count(one["plane_additions"]),
            "-" if budget is None else f"{budget['spiking']:.1f}",
            "-" if budget is None else f"{budget['quantised']:.1f}",
        )
    return table


def _bytes(moved: Mapping[str, Any]) -> Table:
    size = human_bytes(moved["rule"]["on_chip_bytes"])
    table = _table(
        f"bytes per token, {size} on the chip",
        "batch",
        "stays on the chip",
        "DRAM",
        "DRAM if dense",
        "on chip",
        "weights skipped",
        "state, DRAM",
        "states",
    )
    for key, one in moved.items():
        if key == "rule":
            continue
        table.add_row(
            str(one["batch"]),
            one["residency"],
            human_bytes(one["dram_per_token"]),
            human_bytes(one["dense_dram_per_token"]),
            human_bytes(one["on_chip_per_token"]),
            f"{one['weights']['skipped']:.1%}",
            human_bytes(one["state"]["dram_per_token"]),
            human_bytes(one["state"]["held"]),
        )
    return table


def _energy(energy: Mapping[str, Any], shown: str) -> Table:
    batches = list(energy["total"])
    table = _table(
        f"ESTIMATED energy per token in uJ, prices {shown} (with memory: cheapest and dearest DRAM)",
        "network",
        "arithmetic alone",
        *(f"with memory, {name.replace('_', ' ')}" for name in batches),
    )
    compute = energy["compute"]
    rows = [
        ("dense", "dense", None),
        ("zeros skipped", "effective", None),
        *((f"spikes, {name}", "spikes", name) for name in compute["spikes"]),
    ]
    if compute["spikes"]:
        rows += [
            ("quantised, dense", "quantised_dense", None),
            ("quantised, zeros skipped", "quantised_effective", None),
        ]
    for title, key, coding in rows:
        alone = compute[key] if coding is None else compute[key][coding]
        if alone is None:
            table.add_row(title, *["-"] * (1 + len(batches)))
            continue
        totals = (energy["total"][name][key] for name in batches)
        both = (one if coding is None else one[coding] for one in totals)
        table.add_row(
            title,
            f"{alone / 1e6:.4g}",
            *(f"{one['low'] / 1e6:.4g} to {one['high'] / 1e6:.4g}" for one in both),
        )
    return table


def _measured(measured: Mapping[str, Any]) -> Table:
    table = _table(
        "MEASURED, decoding at batch 1", "layout", "tokens/s", "us per token", "weight bytes per token"
    )
    for name in ("event_driven", "dense"):
        one = measured[name]
        if one is None:
            table.add_row(name.replace("_", "-"), "-", "-", measured["why"] or "-")
            continue
        read = one["weight_bytes_per_token"]
        table.add_row(
            name.replace("_", "-"),
            f"{one['tokens_per_second']:.1f}",
            f"{1e6 * one['seconds_per_token']:.1f}",
            "-" if read is None else human_bytes(read),
        )
    joules = measured["joules_per_token"]
    table.caption = (
        measured["counter"] if joules is None else f"{joules:.4g} J per token, {measured['counter']}"
    )
    return table


def comparison(models: Mapping[str, Mapping[str, Any]], shown: str) -> Table:
    """Several models beside each other."""
    table = _table("beside each other, per token", "", *models)
    rows: list[tuple[str, Any]] = [
        ("dense MACs", lambda one: human_count(one["operations"]["total"]["dense_macs"])),
        ("effective MACs", lambda one: human_count(one["operations"]["total"]["effective_macs"])),
        ("accumulates", lambda one: human_count(one["operations"]["total"]["accumulates"])),
        ("projections over dense", lambda one: f"{one['operations']['projections_over_dense']:.3f}"),
        ("DRAM bytes, batch 1", lambda one: human_bytes(one["bytes"]["batch_1"]["dram_per_token"])),
        (
            "arithmetic, dense, uJ (estimate)",
            lambda one: _microjoules(one["energy"][shown]["compute"]["dense"]),
        ),
        (
            "arithmetic, cheapest coding, uJ (estimate)",
            lambda one: _cheapest(one["energy"][shown]["compute"]),
        ),
        ("tokens/s (measured)", lambda one: _rate(one["measured"])),
    ]
    for name, read in rows:
        table.add_row(name, *(read(one) for one in models.values()))
    return table


def _microjoules(value: float) -> str:
    return f"{value / 1e6:.4g}"


def _cheapest(compute: Mapping[str, Any]) -> str:
    found = [value for value in compute["spikes"].values() if value is not None]
    return _microjoules(min(found)) if found else "no spikes"


def _rate(measured: Mapping[str, Any]) -> str:
    rate = measured["tokens_per_second"]
    return "-" if rate is None else f"{rate:.1f}"
