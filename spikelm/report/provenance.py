"""Where the figures come from: commands, machines, versions, hashes, dates, and how to check them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikelm.report.document import ABSENT, Block, Command, Section, Table, Text, number

Record = Mapping[str, Any]


def provenance(folder: Path, named: Sequence[tuple[str, Record]]) -> Section:
    """The last section.

    Args:
        folder: of the report, as it was given.
        named: path of each record relative to the report, and the record.
    """
    blocks: list[Block] = []
    checkpoints: dict[tuple[str, str, str], list[str]] = {}
    for name, record in named:
        facts = [(what, value) for what, value in _facts(record) if value != ABSENT]
        blocks.append(Table(caption=name, headings=["what", "value"], rows=facts, words=2))
        for label, entry in (record.get("checkpoints") or {}).items():
            key = (label, str(entry.get("path") or ABSENT), str(entry.get("sha256") or ABSENT))
            checkpoints.setdefault(key, []).append(name)
    if checkpoints:
        rows = [(*key, ", ".join(names)) for key, names in checkpoints.items()]
        headings = ["model", "folder", "SHA-256 of the weights", "records"]
        blocks.insert(0, Table(caption="checkpoints", headings=headings, rows=rows, words=4))
    blocks += [
        Text(
            text="To measure again and compare, in the folder where the records were made, since checkpoints "
            "and texts may be named from there:"
        ),
        Command(
            text="\n".join(f"spikelm eval --verify {shlex.quote(str(folder / name))}" for name, _ in named)
        ),
    ]
    return Section(title="Provenance", blocks=blocks)


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    machine, data = record.get("machine") or {}, record.get("data") or {}
    yield "kind", str(record.get("kind"))
    yield "date", str(machine.get("date") or ABSENT)
    yield "machine", _machine(machine)
    yield "versions", ", ".join(f"{k} {v}" for k, v in (machine.get("versions") or {}).items()) or ABSENT
    yield "revision", str(machine.get("git_revision") or ABSENT)
    yield "text", str(data.get("source") or data.get("name") or ABSENT)
    yield "SHA-256 of the text", str(data.get("sha256") or ABSENT)
    yield "SHA-256 of the tokenizer", str(record.get("tokenizer_sha256") or ABSENT)
    yield "seed", number(record.get("seed"), ".0f")
    yield "units (n)", number(record.get("n"), ",")
    arguments = (record.get("arguments") or {}).items()
    yield "options", ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments) or ABSENT


def _machine(machine: Mapping[str, Any]) -> str:
    parts = [machine.get("cpu"), machine.get("device")]
    if machine.get("threads"):
        parts.append(f"{machine['threads']} of {machine.get('cores', '?')} cores")
    if machine.get("vector_units"):
        parts.append(" ".join(map(str, machine["vector_units"])))
    return ", ".join(str(part) for part in parts if part) or ABSENT
