"""Where the figures come from: commands, machines, versions, hashes, dates, and how to check them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from spikelm.report.document import ABSENT, Block, Command, Section, Table, Text, number

Record = Mapping[str, Any]


def provenance(named: Sequence[tuple[str, Record]]) -> Section:
    """The last section.

    Args:
        named: path of each record relative to the report, and the record.
    """
    rows, checkpoints, asked = [], [], []
    for name, record in named:
        machine = record.get("machine") or {}
        data = record.get("data") or {}
        rows.append(
            (
                name,
                str(record.get("kind")),
                str(machine.get("date") or ABSENT),
                _machine(machine),
                str(machine.get("git_revision") or ABSENT),
                _versions(machine.get("versions") or {}),
                str(data.get("source") or data.get("name") or ABSENT),
                str(data.get("sha256") or ABSENT),
                str(record.get("tokenizer_sha256") or ABSENT),
                number(record.get("seed"), "d"),
                number(record.get("n"), ","),
            )
        )
        for label, entry in (record.get("checkpoints") or {}).items():
            checkpoints.append(
                (label, str(entry.get("path") or ABSENT), str(entry.get("sha256") or ABSENT), name)
            )
        asked.append((name, _arguments(record.get("arguments") or {})))
    headings = ["record", "kind", "date", "machine", "revision", "versions", "data", "SHA-256 of the data"]
    headings += ["SHA-256 of the tokenizer", "seed", "n"]
    blocks: list[Block] = [
        Table(caption="records", headings=headings, rows=rows, words=9),
        Table(
            caption="checkpoints",
            headings=["model", "folder", "SHA-256 of the weights", "record"],
            rows=checkpoints,
            words=4,
        ),
        Table(caption="what was asked", headings=["record", "options"], rows=asked, words=2),
        Text(text="To measure again and compare, in the folder of this report:"),
        Command(text="\n".join(f"spikelm eval --verify {shlex.quote(name)}" for name, _ in named)),
    ]
    return Section(title="Provenance", blocks=blocks)


def _machine(machine: Mapping[str, Any]) -> str:
    parts = [machine.get("cpu"), machine.get("device")]
    if machine.get("threads"):
        parts.append(f"{machine['threads']} of {machine.get('cores', '?')} cores")
    if machine.get("vector_units"):
        parts.append(" ".join(map(str, machine["vector_units"])))
    return ", ".join(str(part) for part in parts if part) or ABSENT


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items()) or ABSENT


def _arguments(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
