"""Writing a report: the page, its Markdown twin, the pictures and the records themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikelm.errors import ConfigError, DataError
from spikelm.plots import canvas
from spikelm.plots.records import check
from spikelm.report import costs, quality, spikes, tasks
from spikelm.report.document import Document, Picture, Section
from spikelm.report.markdown import markdown
from spikelm.report.page import page
from spikelm.report.provenance import provenance

PAGE, MARKDOWN, PICTURES, RECORDS = "report.html", "report.md", "pictures", "records"


def write_report(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    checkpoints: Mapping[str, Path],
    text_sample: str | None,
) -> Path:
    """Make a report of records of measurements.

    Writes ``report.html`` (pictures inlined, nothing else needed), ``report.md`` with ``pictures/*.svg``,
    and ``records/*.json``. Files of those names are replaced; others in the folder stay.

    Args:
        folder: where to; made if it is missing.
        records: of :mod:`spikelm.evaluation.record`, of any kinds.
        checkpoints: label -> folder of the models that rasters are drawn of; may be empty.
        text_sample: what those models read for them, or None for no rasters.

    Returns:
        Path of ``report.html``.

    Raises:
        DataError: there are no records, or one is none of a measurement.
        ConfigError: a file cannot be written.
    """
    if not records:
        raise DataError("a report needs at least one record; give files that --json of spikelm eval wrote")
    check(records)
    named = _named(records)
    document = compose(folder, named, checkpoints, text_sample)
    drawn = {
        block.name: (_svg(block, canvas.LIGHT), _svg(block, canvas.DARK))
        for section in document.sections
        for block in section.blocks
        if isinstance(block, Picture)
    }
    target = folder / PAGE
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        (folder / RECORDS).mkdir(exist_ok=True)
        for name, record in named:
            (folder / name).write_text(_json(record), encoding="utf-8")
        for name, (light, _) in drawn.items():
            (folder / PICTURES / f"{name}.svg").write_bytes(light)
        (folder / MARKDOWN).write_text(markdown(document, PICTURES), encoding="utf-8")
        target.write_text(page(document, drawn), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report {folder}: {error.strerror or error}") from error
    return target


def compose(
    folder: Path,
    named: Sequence[tuple[str, Mapping[str, Any]]],
    checkpoints: Mapping[str, Path],
    text_sample: str | None,
) -> Document:
    """What the report says.

    Args:
        folder: of the report, as it was given.
        named: file of each record relative to the report, and the record.
        checkpoints: see :func:`write_report`.
        text_sample: see :func:`write_report`.
    """
    records = [record for _, record in named]
    off = [
        label
        for record in records
        if (record.get("arguments") or {}).get("twin")
        for label in record.get("checkpoints") or {}
    ]
    rasters, undrawn = spikes.rasters(checkpoints, text_sample, off)
    found: list[Section | str] = [
        quality.figures(records),
        quality.comparisons(records),
        costs.pareto(records),
        quality.positions(records),
        quality.lengths(records),
        tasks.tasks(records),
        tasks.long_context(records),
        spikes.rates(records),
        *([] if rasters is None else [rasters]),
        costs.ledger(records),
        provenance(folder, named),
    ]
    missing = [entry for entry in found if isinstance(entry, str)]
    labels = list(dict.fromkeys(label for record in records for label in record.get("checkpoints") or {}))
    models = ", ".join(labels) or "no checkpoint"
    return Document(
        title="SpikeLM report",
        lead=f"{models}: measurements from {len(records)} {'record' if len(records) == 1 else 'records'}.",
        sections=[entry for entry in found if isinstance(entry, Section)],
        missing=[*missing, *undrawn],
    )


def _named(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Records with file names of their own: eval.json, eval-2.json, energy.json, ..."""
    seen: dict[str, int] = {}
    named = []
    for record in records:
        # The kind may come from a file that somebody sent: it names a file here, and no folder.
        kind = "".join(c if c.isascii() and c.isalnum() else "-" for c in str(record.get("kind"))) or "record"
        seen[kind] = seen.get(kind, 0) + 1
        suffix = "" if seen[kind] == 1 else f"-{seen[kind]}"
        named.append((f"{RECORDS}/{kind}{suffix}.json", record))
    return named


def _svg(picture: Picture, theme: canvas.Theme) -> bytes:
    return canvas.rendered(picture.draw(theme), "svg")


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON values with null for numbers that are not finite, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
