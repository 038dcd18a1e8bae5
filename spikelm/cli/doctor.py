"""``spikelm doctor``: what works on this machine, what does not, and how to mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from spikelm.cli._common import JsonOption, console, write_json

if TYPE_CHECKING:
    from spikelm.doctor import Finding

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(json: JsonOption = None) -> None:
    """Check this machine: what works, what does not, how to mend it.

    The exit code is 0 unless something essential fails (then 1).

    Example: spikelm doctor --json doctor.json
    """
    from spikelm.doctor import examine, summary

    findings = examine()
    if str(json) != "-":
        _show(findings)
    write_json(json, summary(findings))
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="spikelm doctor", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.mend:
            found.append(f"\n-> {finding.mend}", style=_STYLES[finding.verdict])
        table.add_row(Text(finding.verdict, style=_STYLES[finding.verdict]), finding.name, found)
    out = console()
    out.print(table)
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in _STYLES}
    if counts["fail"]:
        out.print(f"{counts['fail']} essential part(s) do not work: see the lines marked fail.")
    elif counts["warn"]:
        out.print(f"Everything essential works; {counts['warn']} line(s) could be better.")
    else:
        out.print("Everything works.")
