"""Sections on what models can do: tasks, and retrieval from long contexts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from spikelm.plots import curves
from spikelm.plots.curves import Point
from spikelm.report.document import ABSENT, Block, Picture, Section, Table, number, with_error

Record = Mapping[str, Any]


def tasks(records: Sequence[Record]) -> Section | str:
    """One row for each task and metric, one column for each model."""
    blocks: list[Block] = []
    for record in records:
        if record.get("kind") != "tasks":
            continue
        models: Mapping[str, Mapping[str, Mapping[str, Any]]] = record["results"].get("models") or {}
        names = list(dict.fromkeys(task for found in models.values() for task in found))
        rows = []
        for task in names:
            entries = {label: found.get(task) or {} for label, found in models.items()}
            metrics = list(
                dict.fromkeys(
                    key
                    for entry in entries.values()
                    for key, value in entry.items()
                    if key != "n" and not key.endswith("_stderr") and not isinstance(value, (str, bool))
                )
            )
            n = next((entry["n"] for entry in entries.values() if "n" in entry), None)
            rows += [
                (
                    task,
                    metric,
                    number(n, ","),
                    *(with_error(e.get(metric), e.get(f"{metric}_stderr")) for e in entries.values()),
                )
                for metric in metrics
            ]
        if rows:
            caption = "scores of lm-evaluation-harness tasks, ± one standard error"
            headings = ["task", "metric", "examples", *models]
            blocks.append(Table(caption=caption, headings=headings, rows=rows, words=2))
    if not blocks:
        return "Tasks: no record of spikelm eval --tasks was given."
    return Section(title="Tasks", blocks=blocks)


def long_context(records: Sequence[Record]) -> Section | str:
    """Accuracy by kind, length and depth."""
    blocks: list[Block] = []
    for index, record in enumerate(record for record in records if record.get("kind") == "long-context"):
        models: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]] = (
            record["results"].get("models") or {}
        )
        rows = [
            (
                label,
                kind,
                number(entry.get("length"), ","),
                number(entry.get("depth"), ".0%"),
                with_error(entry.get("accuracy"), entry.get("stderr"), ".3f"),
                number(entry.get("n"), ","),
            )
            for label, kinds in models.items()
            for kind, entries in kinds.items()
            for entry in entries
        ]
        if not rows:
            continue
        headings = ["model", "kind", "length in tokens", "depth", "accuracy", "examples"]
        for kind in dict.fromkeys(kind for kinds in models.values() for kind in kinds):
            series = {
                label: points
                for label, kinds in models.items()
                if (points := by_length(kinds.get(kind) or ()))
            }
            if series:
                blocks.append(
                    Picture(
                        name=f"long-context-{index + 1}-{len(blocks) + 1}",
                        alt=f"Accuracy of {kind} by length, mean over depths; numbers in the table below.",
                        draw=partial(_draw, series, kind),
                    )
                )
        caption = "retrieval from long contexts, ± one standard error"
        blocks.append(Table(caption=caption, headings=headings, rows=rows, words=2))
    if not blocks:
        return "Long context: no record of spikelm eval --long-context was given."
    return Section(title="Long context", blocks=blocks)


def by_length(entries: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Accuracy by length, the mean over depths weighted by examples, with its standard error.

    The error is that of a weighted mean of independent depths; None where one of them has none.
    """
    cells: dict[float, list[tuple[float, float, float | None]]] = defaultdict(list)
    for entry in entries:
        length, accuracy = entry.get("length"), entry.get("accuracy")
        if ABSENT in (number(length), number(accuracy)) or not length:
            continue
        error = entry.get("stderr")
        weight = float(entry.get("n") or 1)
        cells[float(length)].append(
            (weight, float(accuracy or 0.0), None if number(error) == ABSENT else error)
        )
    points: list[Point] = []
    for length, cell in sorted(cells.items()):
        total = sum(weight for weight, *_ in cell)
        mean = sum(weight * accuracy for weight, accuracy, _ in cell) / total
        errors = [weight * error for weight, _, error in cell if error is not None]
        known = len(errors) == len(cell)
        points.append((length, mean, sum(e * e for e in errors) ** 0.5 / total if known else None))
    return points


def _draw(series: Mapping[str, Sequence[Point]], kind: str, theme: Any) -> Any:
    return curves.draw(
        series,
        x="length of the context in tokens",
        y="share of right answers",
        title=kind,
        from_zero=True,
        theme=theme,
    )
