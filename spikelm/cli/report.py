"""``spikelm report``: one page for people from records of measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spikelm.cli._common import JsonOption, write_json


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the report to.")],
    records: Annotated[
        list[Path],
        typer.Argument(metavar="RECORD.json...", help="Files that --json of spikelm eval and energy wrote."),
    ],
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            metavar="CKPT",
            help="Draw rasters of this checkpoint; may be given several times.",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text that is read for the rasters.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="Take that text from the first document of a source."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Make a report of records that exist already.

    Leaves DIR/report.html, one file with all pictures in it; DIR/report.md with pictures beside it; and the
    records in DIR/records. What has no record is named as not measured.

    Example: spikelm report out eval.json energy.json --checkpoint runs/demo/spiking --text "A list is"
    """
    from spikelm.errors import ConfigError
    from spikelm.evaluation.record import read
    from spikelm.report import write_report

    if text is not None and data is not None:
        raise ConfigError("give the text by --text or by --data, not both")
    if checkpoint and text is None and data is None:
        raise ConfigError("rasters need a text that the checkpoints read; give --text or --data")
    found = [read(path) for path in records]
    labelled = _labelled(checkpoint or (), found)
    sample = text if data is None else _first(data)
    page = write_report(folder, found, checkpoints=labelled, text_sample=sample)
    write_json(json_file, {"report": page, "records": len(found), "checkpoints": labelled})
    if str(json_file) != "-":
        print(f"report: {page}")


def _first(data: str) -> str:
    from spikelm.data.source import open_source
    from spikelm.errors import DataError

    source = open_source(data)
    document = next((document for document in source.documents() if document.strip()), None)
    if document is None:
        raise DataError(f"{data} has no text; expected at least one document")
    return document


def _labelled(folders: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """Folders under the labels that the records use for the same model, else under their names."""
    from spikelm.checkpoint import read_config, resolve_folder
    from spikelm.evaluation.record import identity
    from spikelm.plots.pareto import same_model, unique

    known = {
        same_model(entry): label
        for record in records
        for label, entry in (record.get("checkpoints") or {}).items()
    }
    taken: set[str] = set()
    labelled = {}
    for folder in folders:
        read_config(folder)  # a folder that is none is told as one
        own = same_model(identity(resolve_folder(folder)))
        labelled[unique(known.get(own, folder.resolve().name), taken)] = folder
    return labelled
