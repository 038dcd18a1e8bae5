"""What a conversion did, per projection and as a whole: values for JSON, and a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from spikelm.codings.meter import CountMeter
from spikelm.codings.statistics import CountHistogram
from spikelm.codings.statistics import report as codings_report
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.quantisation.search import Choice
from spikelm.quantisation.spiking import Plan

SHORT = 7
"""Counts up to this magnitude fit three bit planes; their share is reported."""


def projection_rows(
    before: SpikeLM, after: SpikeLM, plan: Plan, meter: CountMeter
) -> dict[str, dict[str, Any]]:
    """Figures of every projection of the converted model.

    Args:
        before: the model as it was trained.
        after: the converted one.
        plan: what was chosen.
        meter: what it counted on the held-out text.
    """
    activity = meter.summary()["projections"]
    old = {path: module for path, module in before.named_modules() if isinstance(module, Projection)}
    rows: dict[str, dict[str, Any]] = {}
    for path, module in after.named_modules():
        if not isinstance(module, Projection):
            continue
        spec = dict(after.config.input_neuron(path))
        row: dict[str, Any] = {
            "neuron": spec,
            "status": _status(path, plan, module),
            "bytes_before": _bytes(old[path]),
            "bytes_after": _bytes(module),
            "bytes_bfloat16": 2 * module.in_features * module.out_features,
        }
        if path in plan.choices:
            choice = plan.choices[path]
            row |= {
                "relative_error": choice.error,
                "predicted_nats": choice.penalty,
                "clipped": choice.clipped,
                "beyond_127": choice.beyond,
                "relative_error_uniform": plan.uniform[path].error,
            }
        histogram = meter.histograms.get(path)
        if histogram is not None and histogram.total:
            row |= {
                "spike_rate": 1.0 - histogram.silent,
                "silent": histogram.silent,
                "never_fired": activity[path]["never_fired"],
                "mean_count": histogram.mean_magnitude,
                "ones_per_count": histogram.ones_per_count,
                "counts_up_to_7": histogram.within(SHORT),
                "largest_count": histogram.needed,
                "codings": codings_report(histogram),
            }
        rows[path] = row
    return rows


def _status(path: str, plan: Plan, module: Projection) -> str:
    if path in plan.exact:
        return f"stays in full precision (neuron {plan.kept[path]})"
    if path in plan.kept:
        return f"keeps its binary neuron ({plan.kept[path]})"
    if path in plan.unseen:
        return "saw no calibration token: k as asked for"
    if path in plan.choices:
        return "converted"
    return "spiking" if module.neuron.spiking else "dense"


def _bytes(projection: Projection) -> int:
    total = 0
    for name in ("weight", "scales"):
        value = getattr(projection.linear, name, None)
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total


def totals(rows: Mapping[str, dict[str, Any]], plan: Plan, meter: CountMeter) -> dict[str, Any]:
    """Means over the converted projections, plain and weighted by multiply-accumulates, and sums of bytes."""
    keys = ["relative_error", "spike_rate", "silent", "never_fired", "mean_count", "ones_per_count"]
    keys += ["counts_up_to_7", "clipped", "beyond_127"]
    converted = {path: rows[path] for path in plan.choices}
    weight = sum(plan.sizes[path] for path in converted) or 1

    def mean(key: str) -> float | None:
        values = [row[key] for row in converted.values() if key in row]
        return sum(values) / len(values) if values else None

    def weighted(key: str) -> float | None:
        if any(key not in row for row in converted.values()):
            return None
        return float(sum(plan.sizes[path] * row[key] for path, row in converted.items())) / weight

    return {
        "projections": len(converted),
        "mean_over_projections": {key: mean(key) for key in keys},
        "mean_over_multiply_accumulates": {key: weighted(key) for key in keys},
        "predicted_nats_per_token": sum(choice.penalty for choice in plan.choices.values()),
        "predicted_nats_per_token_uniform": sum(choice.penalty for choice in plan.uniform.values()),
        "bytes_before": sum(row["bytes_before"] for row in rows.values()),
        "bytes_after": sum(row["bytes_after"] for row in rows.values()),
        "bytes_bfloat16": sum(row["bytes_bfloat16"] for row in rows.values()),
        "codings": codings_report(histogram_of(meter, plan.choices)),
    }


def histogram_of(meter: CountMeter, choices: Mapping[str, Choice]) -> CountHistogram:
    """The counts of all converted projections together."""
    total = CountHistogram()
    for path in choices:
        if path in meter.histograms:
            total = total.merged(meter.histograms[path])
    return total


def markdown(report: Mapping[str, Any]) -> str:
    """The page ``spike_report.md``."""
    figures: Mapping[str, Any] = report["bits_per_byte"]
    lines = ["# Spike report", "", f"`spikelm convert spike`, {_described(report)}.", ""]
    lines += ["| model | bits per byte | ± s.e. |", "| --- | ---: | ---: |"]
    for name, figure in figures.items():
        error = figure["stderr_bits_per_byte"]
        lines.append(
            f"| {name} | {figure['bits_per_byte']:.4f} | {'-' if error is None else f'{error:.4f}'} |"
        )
    label = next(iter(figures.values()))["label"]
    lines += ["", f"Held-out text: {report['evaluation']['name']}, {label}.", ""]
    total = report["totals"]
    if "one_k_for_all" in report:
        found, alike = (
            entry["mean_over_multiply_accumulates"]["ones_per_count"]
            for entry in (total, report["one_k_for_all"])
        )
        if found is not None and alike is not None:
            lines += [
                f"Ones per count, weighted by multiply-accumulates: {found:.4f} converted, {alike:.4f} with "
                "one k for all (the budget, there on the calibration rows).",
                "",
            ]
    lines += [
        f"Weights of the projections: {total['bytes_before']:,} bytes before, {total['bytes_after']:,} after "
        f"({total['bytes_bfloat16']:,} in bfloat16).",
        "",
        "## Projections",
        "",
        "Relative error and clipped share: calibration rows of the model as it was trained. The rest: the "
        "converted model on the held-out text. Silent: share of (token, channel) pairs with the count 0; a "
        "kernel may skip these.",
        "",
        *_table(_HEADS, [_row(path, row) for path, row in report["projections"].items()]),
    ]
    mean = total["mean_over_projections"]
    if mean["relative_error"] is not None:
        lines.append(_joined(["mean of the converted", "", *_values(mean), ""]))
    lines += ["", "## Codings", "", *_coding_lines(total["codings"])]
    lines += ["", "### Sparsity per projection (exact windows)", "", *_coding_rows(report["projections"])]
    return "\n".join(lines) + "\n"


def _described(report: Mapping[str, Any]) -> str:
    request = report["request"]
    group = "one scale per output" if request["group_size"] is None else f"groups of {request['group_size']}"
    weights = f"int8 weights ({group})" if request["weights"] == "int8" else "float weights"
    search = "k, cap and clipping searched" if request["search"] else "the same k everywhere"
    samples = f"{report['calibration']['windows']} windows, {report['calibration']['tokens']:,} tokens"
    where = f"calibrated on {report['calibration']['name']} ({samples})"
    return f"k = {request['k']:g}, {weights}, {search}; {where}"


_KEYS = (
    *("relative_error", "spike_rate", "silent", "never_fired", "ones_per_count", "counts_up_to_7"),
    *("clipped", "beyond_127"),
)
_HEADS = (
    *("projection", "neuron", "relative error", "spike rate", "silent", "never fired", "ones per count"),
    *("counts up to 7", "clipped by the cap", "beyond 127", "bytes before -> after"),
)


def _values(row: Mapping[str, Any]) -> list[str]:
    return ["-" if row.get(key) is None else f"{row[key]:.4f}" for key in _KEYS]


def _row(path: str, row: Mapping[str, Any]) -> list[str]:
    neuron = row["neuron"]
    name = neuron["name"]
    if name == "adaptive":
        name = f"adaptive k={neuron.get('k', 3.0):.2f} cap={neuron.get('cap', 127)}"
    return [path, name, *_values(row), f"{row['bytes_before']:,} -> {row['bytes_after']:,}"]


def _joined(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    rule = _joined(["---", "---"] + ["---:"] * (len(heads) - 2))
    return [_joined(list(heads)), rule, *map(_joined, rows)]


def _coding_lines(codings: Mapping[str, Any]) -> list[str]:
    lines = [
        "All counts of the converted projections. Exact: as many micro-steps as the largest count needs. "
        "Short windows send larger counts as their limit, and cut the share given.",
        "",
    ]
    rows = []
    for name, entry in codings.items():
        if "not_applicable" in entry:
            rows.append([name, entry["not_applicable"], "-", "-", "-", "-"])
            continue
        windows = [("exact", entry["exact"]), *((f"counts to {n}", w) for n, w in entry["windows"].items())]
        for label, figures in windows:
            cells = [name, label, str(figures["steps"]), f"{figures['events_per_channel']:.4f}"]
            rows.append([*cells, f"{figures['sparsity']:.4f}", f"{figures['cut']:.4f}"])
    heads = ("coding", "window", "micro-steps", "events per channel", "sparsity", "cut")
    return [*lines, *_table(heads, rows)]


def _coding_rows(projections: Mapping[str, Any]) -> list[str]:
    spiking = {path: row["codings"] for path, row in projections.items() if "codings" in row}
    if not spiking:
        return ["No projection has spikes as its input."]
    names = list(next(iter(spiking.values())))

    def show(entry: Mapping[str, Any]) -> str:
        if "not_applicable" in entry:
            return "no code"
        return f"{entry['exact']['sparsity']:.4f} ({entry['exact']['steps']})"

    rows = [[path, *(show(entry[name]) for name in names)] for path, entry in spiking.items()]
    return [
        "Share of zeros over all micro-steps, with their number in brackets; no code: negative counts.",
        "",
        *_table(("projection", *names), rows),
    ]
