"""Sections on what models cost: operations, bytes, energy, measured seconds; and the Pareto picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from spikelm.errors import DataError
from spikelm.plots import pareto as plot
from spikelm.report.document import ABSENT, Block, Lines, Picture, Section, Table, Text, number

Record = Mapping[str, Any]


def ledger(records: Sequence[Record]) -> Section | str:
    """Operations, bytes, energy and seconds per token, apart from one another."""
    blocks: list[Block] = []
    for record in records:
        if record.get("kind") == "energy" and record["results"].get("models"):
            blocks += _ledger(record["results"]["models"])
    if not blocks:
        return "Operations, bytes, energy and seconds: no record of spikelm energy was given."
    blocks.append(
        Text(
            text="All per token. Operations and bytes are counted on the text that was read; energies are "
            "estimates from a table of prices; seconds and joules are measured. None stands for another."
        )
    )
    return Section(title="Operations, bytes and seconds", blocks=blocks)


def _ledger(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    totals = {label: _get(model, "operations", "total") for label, model in models.items()}
    yield Table(
        caption="operations per token, whole model",
        headings=[
            "model",
            "dense MACs",
            "MACs without zeros",
            "of these not spikes",
            "accumulates",
            "share with spikes",
            "silent inputs",
        ],
        rows=[
            (
                label,
                *(
                    number(total.get(key))
                    for key in ("dense_macs", "effective_macs", "macs_without_spikes", "accumulates")
                ),
                number(total.get("spiking_share"), ".1%"),
                number(total.get("silent"), ".1%"),
            )
            for label, total in totals.items()
        ],
    )
    rows = [
        (
            label,
            size.removeprefix("batch_"),
            str(entry.get("residency") or ABSENT),
            *(
                number(entry.get(key))
                for key in ("dram_per_token", "dense_dram_per_token", "on_chip_per_token")
            ),
        )
        for label, model in models.items()
        for size, entry in _get(model, "bytes").items()
        if size.startswith("batch_") and isinstance(entry, Mapping)
    ]
    if rows:
        yield Table(
            caption="bytes per token",
            headings=["model", "batch", "stays on chip", "memory", "memory, every weight read", "on chip"],
            rows=rows,
            words=3,
        )
    energies = [row for label, model in models.items() for row in _energies(label, model)]
    if energies:
        yield Table(
            caption="estimated energy per token in picojoules, arithmetic alone and with memory (batch 1)",
            headings=["model", "prices", "what", "arithmetic", "with memory, low", "high"],
            rows=energies,
            words=3,
        )
    yield Table(
        caption="measured per token",
        headings=["model", "seconds", "tokens/s", "joules", "threads", "counter or reason"],
        rows=[
            (
                label,
                number(measured.get("seconds_per_token")),
                number(measured.get("tokens_per_second")),
                number(measured.get("joules_per_token")),
                number(measured.get("threads"), ","),
                str(measured.get("why") or measured.get("counter") or ABSENT),
            )
            for label, measured in ((label, _get(model, "measured")) for label, model in models.items())
        ],
    )
    for label, model in models.items():
        sentences = [str(item) for item in model.get("verdict") or ()]
        if sentences:
            yield Text(text=f"Verdict on {label}:")
            yield Lines(items=sentences)


def _energies(label: str, model: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for table, entry in _get(model, "energy").items():
        if not isinstance(entry, Mapping):
            continue
        compute, total = _get(entry, "compute"), _get(entry, "total", "batch_1")
        spikes = _get(compute, "spikes")
        rows: list[tuple[str, Any, Mapping[str, Any]]] = [
            ("dense", compute.get("dense"), _get(total, "dense")),
            ("without zeros", compute.get("effective"), _get(total, "effective")),
            (
                "quantised, without zeros",
                compute.get("quantised_effective"),
                _get(total, "quantised_effective"),
            ),
            ("quantised, int8 weights", compute.get("quantised_int8"), {}),
            *((f"spikes, {name}", value, _get(total, "spikes", name)) for name, value in spikes.items()),
        ]
        for name, value, span in rows:
            if number(value) != ABSENT or span:
                yield (
                    label,
                    str(table),
                    name,
                    number(value),
                    number(span.get("low")),
                    number(span.get("high")),
                )


def pareto(records: Sequence[Record]) -> Section | str:
    """Bits per byte against three costs."""
    try:
        numbers = plot.pareto(records)
    except DataError as error:
        return f"Bits per byte against costs: {error}."
    fronts = "; ".join(
        f"{cost}: {', '.join(labels) or 'not measured'}" for cost, labels in numbers["fronts"].items()
    )
    costs = ("operations", "dense_macs", "accumulates", "bytes", "seconds")
    rows = [
        (model["label"], number(model["bits_per_byte"], ".4f"), *(number(model[cost]) for cost in costs))
        for model in numbers["models"]
    ]
    headings = ["model", "bits/byte", "MACs without zeros", "dense MACs", "accumulates", "bytes", "seconds"]
    blocks: list[Block] = [
        Picture(
            name="pareto",
            alt=f"Bits per byte ({numbers['figure']}) against operations, bytes and seconds per token. "
            f"Not beaten in both by another model - {fronts}.",
            draw=partial(_draw, numbers),
        ),
        Table(caption=f"the same in numbers ({numbers['figure']})", headings=headings, rows=rows),
    ]
    blocks.append(
        Text(
            text="A count of spikes is one multiply-accumulate here, however large; sent one by one, it is "
            "as many additions as the column of accumulates says."
        )
    )
    if numbers["unmatched"]:
        blocks.append(
            Text(text=f"With a record of one half only, so left out: {', '.join(numbers['unmatched'])}.")
        )
    return Section(title="Bits per byte against costs", blocks=blocks)


def _draw(numbers: Mapping[str, Any], theme: Any) -> Any:
    return plot.draw(numbers, theme=theme)


def _get(value: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A mapping inside mappings; empty where it is missing or null."""
    for key in keys:
        inner = value.get(key)
        value = inner if isinstance(inner, Mapping) else {}
    return value
