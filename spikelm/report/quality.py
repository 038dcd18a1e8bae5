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
    "bits/character": ("bits_per_character",),
    "perplexity/word (original page)": ("original", "word_perplexity"),
    "bits/byte (original page)": ("original", "bits_per_byte"),
}
"""Figures that only some texts have: heading -> keys inside a figure."""


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
        more = [
            heading
            for heading, keys in OPTIONAL.items()
            if any(number(inside(figure, *keys)) != ABSENT for *_, figure in found)
        ]
        rows = [
            (
                label,
                name,
                with_error(figure.get("bits_per_byte"), figure.get("stderr_bits_per_byte")),
                with_error(figure.get("nats_per_token"), figure.get("stderr_nats_per_token")),
                number(figure.get("perplexity_per_token")),
                number(figure.get("perplexity_per_byte")),
                *(number(inside(figure, *OPTIONAL[heading])) for heading in more),
                number(figure.get("tokens"), ","),
                number(model.get("parameters"), ","),
            )
            for label, model, name, figure in found
        ]
        headings = ["model", "figure", "bits/byte", "nats/token", "perplexity/token", "perplexity/byte"]
        headings += [*more, "tokens", "parameters"]
        over = sorted({str(figure.get("stderr_over")) for *_, figure in found if figure.get("stderr_over")})
        caption = text_of(record) + (f"; ± one standard error over {' or '.join(over)}" if over else "")
        blocks.append(Table(caption=caption, headings=headings, rows=rows, words=2))
        blocks += _parts(record)
    if not blocks:
        return "Bits per byte and perplexity: no record of spikelm eval with figures was given."
    blocks.append(
        Text(
            text="disjoint@L reads windows of L tokens side by side, strided@L/S windows that overlap, "
            "carried whole documents with one state. Figures of different names do not compare."
        )
    )
    return Section(title="Bits per byte", blocks=blocks)


def _parts(record: Record) -> Iterator[Table]:
    """What some texts have besides: last words of passages, and every book by itself."""
    models = record["results"]["models"]
    ends = {label: model["last_word"] for label, model in models.items() if model.get("last_word")}
    if ends:
        yield Table(
            caption="last words of passages, ± one standard error",
            headings=["model", "accuracy", "perplexity", "passages"],
            rows=[
                (
                    label,
                    with_error(found.get("accuracy"), found.get("accuracy_stderr")),
                    with_error(found.get("perplexity"), found.get("perplexity_stderr"), ".4g"),
                    number(found.get("n"), ","),
                )
                for label, found in ends.items()
            ],
        )
    books = [
        (
            label,
            str(entry.get("name")),
            number(entry.get("bits_per_byte"), ".4f"),
            number(entry.get("bytes"), ","),
        )
        for label, model in models.items()
        for entry in model.get("documents") or ()
    ]
    if books:
        headings = ["model", "document", "bits/byte", "bytes"]
        yield Table(caption="every document by itself", headings=headings, rows=books, words=2)


def inside(value: Mapping[str, Any], *keys: str) -> Any:
    """A value inside mappings; None where one of them is missing."""
    found: Any = value
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


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
        return "Loss by position: no record holds it (spikelm eval with figures does)."
    return Section(title="Loss by position", blocks=blocks)


def lengths(records: Sequence[Record]) -> Section | str:
    """Perplexity by the length of the context."""
    blocks: list[Block] = []
    for index, record in enumerate(evaluations(records)):
        found: Mapping[str, Mapping[str, Any]] = record["results"].get("lengths") or {}
        rows = [
            (
                label,
                number(point.get("tokens"), ","),
                with_error(point.get("nats_per_token"), point.get("stderr")),
                number(point.get("perplexity_per_token")),
                number(point.get("bits_per_byte"), ".4f"),
                with_error(
                    inside(point, "last_half", "gain"), inside(point, "last_half", "gain_stderr"), "+.4f"
                ),
                number(entry.get("state_bytes"), ","),
            )
            for label, entry in found.items()
            for point in entry.get("points") or ()
        ]
        if not rows:
            continue
        headings = ["model", "length in tokens", "nats/token", "perplexity/token", "bits/byte"]
        headings += ["gain in the last half", "bytes of state"]
        windows = sorted({str(entry.get("window")) for entry in found.values()})
        caption = (
            f"{text_of(record)}; gain: nats per token that windows of {' or '.join(windows)} tokens need more"
        )
        blocks.append(Table(caption=caption, headings=headings, rows=rows))
        series = {
            # The error of exp(m) is exp(m) times that of m, for small errors.
            label: [(x, math.exp(y), error and math.exp(y) * error) for x, y, error in points]
            for label, entry in found.items()
            if (points := list(_points(entry.get("points") or (), "tokens", "nats_per_token")))
        }
        if series:
            blocks.append(
                Picture(
                    name=f"perplexity-by-length-{index + 1}",
                    alt=f"Perplexity per token by length of the context on {text_of(record)}; numbers in the "
                    "table above.",
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


def _points(entries: Any, x: str, y: str) -> Iterator[Point]:
    """Points whose numbers are finite, in the order of x."""
    found = [
        (float(entry[x]), float(entry[y]), None if number(entry.get("stderr")) == ABSENT else entry["stderr"])
        for entry in (entries if isinstance(entries, Sequence) else ())
        if ABSENT not in (number(entry.get(x)), number(entry.get(y))) and entry[x] > 0 and entry[y] < 700
    ]
    yield from sorted(found, key=lambda point: point[0])


def _curves(series: Mapping[str, Sequence[Point]], theme: Any, **words: Any) -> Any:
    return curves.draw(series, theme=theme, **words)
