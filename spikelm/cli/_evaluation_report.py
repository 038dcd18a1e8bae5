"""What ``spikelm eval`` hands on: measurements on tasks and long contexts, and reports of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikelm.cli._common import console, warn, write_json


def forward(
    folders: Sequence[Path],
    json_file: Path | None,
    wanted: bool,
    *,
    tasks: str | None,
    kinds: str | None,
    limit: int | None,
    batch_size: int,
    lengths: str,
    samples: int,
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any] | None:
    """Measure on tasks or long contexts; the record where it is wanted for a report."""
    import tempfile

    from spikelm.cli import evaluate_tasks
    from spikelm.evaluation.record import read

    with tempfile.TemporaryDirectory() as scratch:
        out = json_file
        if wanted and (out is None or str(out) == "-"):
            out = Path(scratch) / "record.json"
        if tasks is not None:
            evaluate_tasks.run_tasks(
                checkpoints=list(folders),
                tasks=tasks,
                limit=limit,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
                seed=seed,
                json_file=out,
            )
        else:
            evaluate_tasks.run_long_context(
                checkpoints=list(folders),
                kinds=kinds,
                lengths=lengths,
                samples=samples,
                device=device,
                dtype=dtype,
                seed=seed,
                json_file=out,
            )
        record = read(out) if wanted and out is not None else None
    if record is not None and str(json_file) == "-":
        write_json(json_file, record)
    return record


def write_pages(folder: Path, records: list[dict[str, Any]], further: Sequence[Path]) -> None:
    """Write the report of these records and of those in further files."""
    from spikelm.errors import ConfigError
    from spikelm.evaluation.record import read
    from spikelm.report import write_report

    records = records + [read(path) for path in further]
    if not records:
        raise ConfigError("there is nothing to report; measure something, or name results with --include")
    found = {
        label: Path(entry["path"]) for record in records for label, entry in record["checkpoints"].items()
    }
    # Pictures of spikes need the model and text: of a checkpoint that is gone there are none.
    present = {label: path for label, path in found.items() if path.is_dir()}
    page = write_report(folder, records, checkpoints=present, text_sample=_sample(records))
    console().print(f"report: {page}", markup=False)


def _sample(records: Sequence[dict[str, Any]]) -> str | None:
    """How the text of the first record that has one begins; None where it cannot be read here."""
    from spikelm.errors import SpikeLMError
    from spikelm.evaluation.corpus import SAMPLE
    from spikelm.evaluation.standard import open_text

    for record in records:
        source = (record.get("data") or {}).get("source")
        if source is None:
            continue
        try:
            text = open_text(source, data_dir=record["arguments"].get("data_dir"))
            return next(text.source.documents())[:SAMPLE]
        except SpikeLMError as error:
            warn(f"the report has no pictures of spikes: {error}")
            return None
    return None
