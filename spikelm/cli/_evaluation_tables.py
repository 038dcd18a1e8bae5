"""What ``spikelm eval`` prints: tables of a record, one column per way of giving context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spikelm.cli._common import console, human_bytes, human_count

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = (
    ("bits/byte", "bits_per_byte", ".4f"),
    ("± s.e.", "stderr_bits_per_byte", ".4f"),
    ("nats/token", "nats_per_token", ".4f"),
    ("nats/byte", "nats_per_byte", ".4f"),
    ("perplexity/token", "perplexity_per_token", ".4g"),
    ("perplexity/byte", "perplexity_per_byte", ".4g"),
)
_ORIGINAL = (
    ("word perplexity", "word_perplexity", ".5g"),
    ("byte perplexity", "byte_perplexity", ".5g"),
    ("bits/byte", "bits_per_byte", ".4f"),
)


def print_record(record: Mapping[str, Any]) -> None:
    """Tables of a record of the kind ``eval`` on standard output."""
    models: Mapping[str, Any] = record["results"]["models"]
    out = console()
    measured = {label: entry for label, entry in models.items() if entry["figures"]}
    if measured:
        first = next(iter(next(iter(measured.values()))["figures"].values()))
        about = (
            f"{record['data']['name']}: {first['bytes']:,} bytes, {first['documents']:,} documents scored"
            if len(models) > 1
            else f"{record['data']['name']}: {first['tokens']:,} tokens, {first['bytes']:,} bytes, "
            f"{first['documents']:,} documents scored"
        )
        if len(models) > 1:
            out.print(_side_by_side(about, measured))
            _print_comparisons(record["results"]["comparisons"])
        else:
            out.print(_one(about, next(iter(measured.values()))["figures"]))
        scored = (
            "scored too, after a start token"
            if record["data"]["first_token_scored"]
            else "not scored (nothing predicts it; see --start)"
        )
        if record["data"]["kind"] == "lambada":
            scored = "only read, like all but the last word"
        out.print(f"standard error over {first['stderr_over']}; a document's first token is {scored}")
    for table in (_other_units(measured), _last_words(measured), _books(measured)):
        if table is not None:
            out.print(table)
    for label, found in record["results"].get("lengths", {}).items():
        out.print(_lengths(label, found))
    if len(models) == 1:
        for entry in measured.values():
            _print_spikes(entry["spikes"])


def _table(title: str, headings: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _with_error(value: float, error: float | None, form: str = ".4f") -> str:
    return format(value, form) + ("" if error is None else f" ± {error:{form}}")


def _one(title: str, figures: Mapping[str, Any]) -> Table:
    """One model: a column per figure."""
    table = _table(title, ["", *figures])
    rows = [*_ROWS]
    if any(figure.get("characters", figure["bytes"]) != figure["bytes"] for figure in figures.values()):
        rows.insert(1, ("bits/character", "bits_per_character", ".4f"))
    for name, key, form in rows:
        table.add_row(name, *(_number(figure[key], form) for figure in figures.values()))
    return table


def _side_by_side(title: str, models: Mapping[str, Any]) -> Table:
    """Several models: a row each, bits per byte in a column per figure."""
    names = list(next(iter(models.values()))["figures"])
    table = _table(f"{title}, bits/byte", ["model", "parameters", *names, "silent inputs"])
    for label, entry in models.items():
        cells = [
            _with_error(
                entry["figures"][name]["bits_per_byte"], entry["figures"][name]["stderr_bits_per_byte"]
            )
            for name in names
        ]
        total = entry["spikes"]["total"]
        silent = f"{total['silent']:.1%}" if total["spiking_share"] else "dense"
        table.add_row(label, human_count(entry["parameters"]), *cells, silent)
    return table


def _print_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> None:
    first = comparisons[0]
    names = list(dict.fromkeys(entry["figure"] for entry in comparisons))
    over = f"{first['n']:,} {first['units']}"
    how = f"{first['level']:.0%} intervals of a paired bootstrap over {over}"
    if first["low"] is None:
        how = f"no interval: there are too few units, {over}"
    table = _table(f"bits/byte more than {first['a']}, {how}", ["model", *names])
    for label in dict.fromkeys(entry["b"] for entry in comparisons):
        cells = {entry["figure"]: _interval(entry) for entry in comparisons if entry["b"] == label}
        table.add_row(label, *(cells.get(name, "-") for name in names))
    console().print(table)


def _interval(entry: Mapping[str, Any]) -> str:
    text = f"{entry['difference_bits_per_byte']:+.4f}"
    if entry["low"] is None:
        return text
    # An interval that holds zero shows no difference.
    return f"{text} ({entry['low']:+.4f} to {entry['high']:+.4f})"


def _other_units(models: Mapping[str, Any]) -> Table | None:
    """Words and bytes of the original page (WikiText); characters where several models are shown."""
    original = [
        (label, name, figure)
        for label, entry in models.items()
        for name, figure in entry["figures"].items()
        if "original" in figure
    ]
    if original:
        counts = original[0][2]["original"]
        note = "" if counts["complete"] else ", a little low: the first token of a page is not scored"
        table = _table(
            f"by the {counts['words']:,} words and {counts['bytes']:,} bytes of the original pages{note}",
            ["model", "figure", *(name for name, _, _ in _ORIGINAL)],
        )
        for label, name, figure in original:
            table.add_row(
                label, name, *(_number(figure["original"][key], form) for _, key, form in _ORIGINAL)
            )
        return table
    rows = [
        (label, name, figure)
        for label, entry in models.items()
        for name, figure in entry["figures"].items()
        if figure.get("characters", figure["bytes"]) != figure["bytes"]
    ]
    if len(models) < 2 or not rows:
        return None
    table = _table("by characters", ["model", "figure", "bits/byte", "bits/character"])
    for label, name, figure in rows:
        table.add_row(label, name, _number(figure["bits_per_byte"]), _number(figure["bits_per_character"]))
    return table


def _last_words(models: Mapping[str, Any]) -> Table | None:
    found = {label: entry["last_word"] for label, entry in models.items() if "last_word" in entry}
    if not found:
        return None
    passages = next(iter(found.values()))["n"]
    table = _table(f"last word of {passages:,} passages", ["model", "accuracy", "perplexity of the word"])
    for label, entry in found.items():
        table.add_row(
            label,
            _with_error(entry["accuracy"], entry["accuracy_stderr"]),
            _with_error(entry["perplexity"], entry["perplexity_stderr"], ".4g"),
        )
    return table


def _books(models: Mapping[str, Any]) -> Table | None:
    found = {label: entry["documents"] for label, entry in models.items() if "documents" in entry}
    if not found:
        return None
    over = next(iter(models.values()))["documents_over"]
    table = _table(f"bits/byte of every book, {over}", ["book", "bytes", *found])
    for rows in zip(*found.values(), strict=True):
        cells = [_number(row["bits_per_byte"]) for row in rows]
        table.add_row(rows[0]["name"], f"{rows[0]['bytes']:,}", *cells)
    return table


def _lengths(label: str, found: Mapping[str, Any]) -> Table:
    table = _table(
        f"{label} by length, one stream with carried state ({human_bytes(found['state_bytes'])}); "
        f"the last half also in windows of {found['window']:,}, each from nothing",
        [
            "tokens",
            "bits/byte",
            "nats/token",
            "last half: carried",
            "windows",
            "gain of carrying, nats/token",
        ],
    )
    for point in found["points"]:
        half = point["last_half"]
        table.add_row(
            f"{point['tokens']:,}",
            _number(point["bits_per_byte"]),
            _with_error(point["nats_per_token"], point["stderr"]),
            _number(half["nats_per_token"]),
            _number(half["window_nats_per_token"]),
            _with_error(half["gain"], half["gain_stderr"]),
        )
    return table


def _print_spikes(found: Mapping[str, Any]) -> None:
    """What entered the weights."""
    out = console()
    total, over = found["total"], found["measured_over"]
    if not found["projections"]:
        return
    if found["neurons"]:
        rates = _table(f"neurons outside projections, over {over}", ["neuron", "firing rate", "never fired"])
        for path, entry in found["neurons"].items():
            rates.add_row(path, *(f"{entry[key]:.4f}" for key in ("firing_rate", "never_fired")))
        out.print(rates)
    if total["spiking_share"] == 0.0:
        out.print("no projection has spikes as its input (dense: every weight is used for every token)")
        return
    spikes = _table(
        f"input of the projections, over {over}",
        ["projection", "spikes", "firing rate", "mean |count| over all inputs", "at cap", "never fired"],
    )
    for path, entry in found["projections"].items():
        spikes.add_row(
            path,
            "yes" if entry["spiking"] else "no",
            *(f"{entry[key]:.4f}" for key in ("firing_rate", "mean_count", "at_cap", "never_fired")),
        )
    spikes.add_row(
        "all, by multiply-accumulates",
        f"{total['spiking_share']:.0%}",
        f"{total['firing_rate']:.4f}",
        f"{total['mean_count']:.4f}",
        "",
        "",
    )
    out.print(spikes)
    if found.get("codings"):
        _print_codings(found["codings"])


def _print_codings(found: Mapping[str, Any]) -> None:
    """Micro-steps, events and sparsity of every coding over all counts."""
    table = _table(
        "codings over all counts, exact windows (as many micro-steps as the largest count needs)",
        ["coding", "micro-steps", "events per channel", "sparsity"],
    )
    for name, entry in found.items():
        if "not_applicable" in entry:
            table.add_row(name, "-", "-", "no code for negative counts")
            continue
        exact = entry["exact"]
        table.add_row(
            name, str(exact["steps"]), f"{exact['events_per_channel']:.4f}", f"{exact['sparsity']:.4f}"
        )
    console().print(table)
