"""What ``spikelm eval`` hands on: measurements on tasks and long contexts, and reports of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikelm.cli._common import console, warn


def forward(
    folders: Sequence[Path],
    json_file: Path | None,
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
) -> dict[str, Any]:
    """Measure on tasks, or on long contexts where ``tasks`` is None; the record."""
    from spikelm.cli.evaluate_tasks import run_long_context, run_tasks

    if tasks is not None:
        return run_tasks(
            checkpoints=list(folders),
            tasks=tasks,
            limit=limit,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            seed=seed,
            json_file=json_file,
        )
    return run_long_context(
        checkpoints=list(folders),
        kinds=kinds or "",
        lengths=lengths,
        samples=samples,
        device=device,
        dtype=dtype,
        seed=seed,
        json_file=json_file,
        batch_size=batch_size,
    )


def write_pages(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write the report of these records."""
    from spikelm.errors import ConfigError
    from spikelm.report import write_report

    if not records:
        raise ConfigError("there is nothing to report; measure something, or name results with --include")
    found = {
        label: Path(entry["path"]) for record in records for label, entry in record["checkpoints"].items()
    }
    # Pictures of spikes need the model and text: of a checkpoint that is gone there are none.
    present = {label: path for label, path in found.items() if path.is_dir()}
    page = write_report(folder, records, checkpoints=present, text_sample=_sample(records))
    console(stderr=True).print(f"report: {page}", markup=False)


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
