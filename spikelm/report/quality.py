"""Sections on how well models predict: figures, comparisons, loss by position, perplexity by length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from spikelm.plots import curves
from spikelm.plots.curves import Point
from spikelm.report.document import ABSENT, Block, Picture, Section, Table, Text, number, with_error

Record = Mapping[str, Any]
OPTIONAL = {
    "perplexity_per_word": "perplexity/word",
    "bits_per_character": "bits/character",
    "accuracy": "accuracy",
}
"""Figures that only some texts have, and their headings."""


def evaluations(records: Sequence[Record]) -> list[Record]:
    """The records of ``spikelm eval`` that hold figures."""
    return [record for record in records if record.get("kind") == "eval" and record["results"].get("models")]


def text_of(record: Record) -> str:
    """What a record was measured on, for people."""
    data = record.get("data") or {}
    name = data.get("name") or data.get("source") or "unnamed text"
    size = data.get("bytes")
    return f"{name}, {size:,} bytes" if isinstance(size, int) else str(name)


def figures(records: Sequence[Record]) -> Section | str:
    """Bits per byte and perplexities of every model."""
    blocks: list[Block] = []
    for record in evaluations(records):
        found = [
            (label, model, name, figure)
            for label, model in record["results"]["models"].items()
            for name, figure in (model.get("figures") or {}).items()
        ]
        if not found:
            continue
        more = [key for key in OPTIONAL if any(figure.get(key) is not None for *_, figure in found)]
        rows = [
            (
                label,
                name,
                with_error(figure.get("bits_per_byte"), figure.get("stderr_bits_per_byte")),
                with_error(figure.get("nats_per_token"), figure.get("stderr_nats_per_token")),
                number(figure.get("perplexity_per_token")),
                number(figure.get("perplexity_per_byte")),
                *(number(figure.get(key)) for key in more),
                number(figure.get("tokens"), ","),
                number(model.get("parameters"), ","),
            )
            for label, model, name, figure in found
        ]
        headings = ["model", "figure", "bits/byte", "nats/token", "perplexity/token", "perplexity/byte"]
        headings += [*(OPTIONAL[key] for key in more), "tokens", "parameters"]
        over = sorted({str(figure.get("stderr_over")) for *_, figure in found if figure.get("stderr_over")})
        caption = text_of(record) + (f"; ± one standard error over {' or '.join(over)}" if over else "")
        blocks.append(Table(caption=caption, headings=headings, rows=rows, words=2))
    if not blocks:
        return "Bits per byte and perplexity: no record of spikelm eval with figures was given."
    blocks.append(
        Text(
            text="disjoint@L reads windows of L tokens side by side, strided@L/S windows that overlap, carried "
            "whole documents with one state. Figures of different names do not compare."
        )
    )
    return Section(title="Bits per byte", blocks=blocks)


def comparisons(records: Sequence[Record]) -> Section | str:
    """Differences between models with their intervals."""
    blocks: list[Block] = []
    for record in evaluations(records):
        rows = []
        for entry in record["results"].get("comparisons") or ():
            low, high = number(entry.get("low"), "+.4f"), number(entry.get("high"), "+.4f")
            difference = number(entry.get("difference_bits_per_byte"), "+.4f")
            rows.append(
                (
                    str(entry.get("b")),
                    str(entry.get("a")),
                    str(entry.get("figure")),
                    difference,
                    ABSENT if ABSENT in (low, high) else f"{low} to {high}",
                    number(entry.get("level"), ".0%"),
                    number(entry.get("n"), ","),
                    _verdict(entry),
                )
            )
        if rows:
            headings = ["model", "against", "figure", "bits/byte more", "interval", "level", "units", "so"]
            blocks.append(Table(caption=text_of(record), headings=headings, rows=rows, words=3))
    if not blocks:
        return "Comparisons between models: no record of spikelm eval with several checkpoints was given."
    blocks.append(
        Text(text="Paired bootstrap over the same units of text; a positive difference is a worse model.")
    )
    return Section(title="Comparisons", blocks=blocks)


def _verdict(entry: Mapping[str, Any]) -> str:
    low, high = entry.get("low"), entry.get("high")
    if number(low) == ABSENT or number(high) == ABSENT or low is None or high is None:
        return "no interval"
    return "worse" if low > 0 else "better" if high < 0 else "undecided"


def positions(records: Sequence[Record]) -> Section | str:
    """Loss by the number of tokens read before."""
    blocks: list[Block] = []
    for index, record in enumerate(evaluations(records)):
        series = {
            label: points
            for label, model in record["results"]["models"].items()
            if (points := list(_points(model.get("by_position") or (), "from", "nats_per_token")))
        }
        if not series:
            continue
        ends = "; ".join(
            f"{label} from {points[0][1]:.3f} to {points[-1][1]:.3f}" for label, points in series.items()
        )
        blocks.append(
            Picture(
                name=f"loss-by-position-{index + 1}",
                alt=f"Loss by position on {text_of(record)}, in nats per token; {ends}.",
                draw=partial(
                    _curves,
                    series,
                    x="tokens read before (bins of powers of two)",
                    y="nats per token",
                    title="loss by position",
                ),
            )
        )
    if not blocks:
        return "Loss by position: no record holds it (spikelm eval with carried state)."
    return Section(title="Loss by position", blocks=blocks)


def lengths(records: Sequence[Record]) -> Section | str:
    """Perplexity by the length of the context."""
    blocks: list[Block] = []
    for index, record in enumerate(evaluations(records)):
        series: dict[str, list[Point]] = {}
        rows = []
        for label, entries in (record["results"].get("lengths") or {}).items():
            for entry in entries if isinstance(entries, Sequence) else ():
                loss = entry.get("nats_per_token")
                rows.append(
                    (
                        label,
                        number(entry.get("length"), ","),
                        with_error(loss, entry.get("stderr")),
                        number(_perplexity(loss)),
                        number(entry.get("tokens"), ","),
                    )
                )
            points = [
                (x, math.exp(y), None if error is None else math.exp(y) * error)
                for x, y, error in _points(entries, "length", "nats_per_token")
                if y < 700
            ]
            if points:
                series[label] = points
        if not rows:
            continue
        headings = ["model", "length in tokens", "nats/token", "perplexity/token", "tokens scored"]
        blocks.append(Table(caption=text_of(record), headings=headings, rows=rows))
        if series:
            blocks.append(
                Picture(
                    name=f"perplexity-by-length-{index + 1}",
                    alt=f"Perplexity per token by length of the context on {text_of(record)}; the table above "
                    "has the numbers.",
                    draw=partial(
                        _curves,
                        series,
                        x="length of the context in tokens",
                        y="perplexity per token",
                        title="perplexity by length",
                    ),
                )
            )
    if not blocks:
        return "Perplexity by length: no record holds it (spikelm eval with --lengths)."
    return Section(title="Perplexity by length", blocks=blocks)


def _perplexity(nats: Any) -> float | None:
    return None if number(nats) == ABSENT or nats > 700 else math.exp(nats)


def _points(entries: Any, x: str, y: str) -> Iterator[Point]:
    """Points whose numbers are finite, in the order of x."""
    found = [
        (float(entry[x]), float(entry[y]), None if number(entry.get("stderr")) == ABSENT else entry["stderr"])
        for entry in (entries if isinstance(entries, Sequence) else ())
        if ABSENT not in (number(entry.get(x)), number(entry.get(y))) and entry[x] > 0
    ]
    yield from sorted(found, key=lambda point: point[0])


def _curves(series: Mapping[str, Sequence[Point]], theme: Any, **words: Any) -> Any:
    return curves.draw(series, theme=theme, **words)
