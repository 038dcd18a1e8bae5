"""``spikelm eval --verify``: run a result again and tell what differs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from spikelm.cli._common import console, counted, write_json

if TYPE_CHECKING:
    from spikelm.evaluation.verify import Verdict

SHOWN = 40
"""Rows of the table of differences at most."""


def verify_file(path: Path, json_file: Path | None) -> int:
    """Run a result again; 0 if it reproduces, else 1."""
    from spikelm.evaluation.job import rerun
    from spikelm.evaluation.record import read
    from spikelm.evaluation.verify import verify

    # The commands of other kinds show their progress themselves.
    shown = functools.partial(rerun, progress=counted) if read(path)["kind"] == "eval" else None
    verdict = verify(path, rerun=shown)
    if str(json_file) != "-":
        _print_verdict(path, verdict)
    write_json(json_file, {"result": path, "reproduced": verdict.reproduced, **dataclasses.asdict(verdict)})
    return 0 if verdict.reproduced else 1


def _print_verdict(path: Path, verdict: Verdict) -> None:
    from rich.table import Table

    out = console()
    asked = "the same bits" if verdict.tolerance == 0 else f"a relative tolerance of {verdict.tolerance:g}"
    same = f"{verdict.identical:,} of {verdict.compared:,} values are the same to the last bit"
    if verdict.reproduced:
        out.print(f"{path} reproduces: {same}, all are within {asked} ({verdict.why})", markup=False)
        return
    table = Table(title=f"{path} does not reproduce: {len(verdict.differences):,} values beyond {asked}")
    for heading in ("value", "recorded", "now"):
        table.add_column(heading, justify="left" if heading == "value" else "right")
    for difference in verdict.differences[:SHOWN]:
        table.add_row(difference.path, str(difference.recorded), str(difference.now))
    out.print(table)
    if len(verdict.differences) > SHOWN:
        out.print(f"and {len(verdict.differences) - SHOWN:,} more (--json has them all)")
    out.print(f"{same}; {verdict.why}", markup=False)
