"""A document as Markdown (GitHub's), with its pictures in files beside it."""

from __future__ import annotations

import re

from spikelm.report.document import Block, Command, Document, Lines, Picture, Table, Text

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$])")
_BEGINNING = re.compile(r"^(\d*)([-+.)])(?=\s|$)")  # what would begin a list


def markdown(document: Document, folder: str = "pictures") -> str:
    """The whole file.

    Args:
        document: what it says.
        folder: where the pictures lie, relative to the file.
    """
    parts = [f"# {_safe(document.title)}", _safe(document.lead)]
    for section in document.sections:
        parts.append(f"## {_safe(section.title)}")
        parts += [_block(block, folder) for block in section.blocks]
    if document.missing:
        parts += ["## Not measured", "\n".join(f"- {_safe(item)}" for item in document.missing)]
    return "\n\n".join(parts) + "\n"


def _safe(text: str) -> str:
    """Text that means itself: no markup, no tags, one line."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    line = _BEGINNING.sub(r"\1\\\2", _SPECIAL.sub(r"\\\1", line))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _block(block: Block, folder: str) -> str:
    match block:
        case Text():
            return _safe(block.text)
        case Lines():
            return "\n".join(f"- {_safe(item)}" for item in block.items)
        case Command():
            return _fenced(block.text)
        case Table():
            rule = ["---"] * block.words + ["---:"] * (len(block.headings) - block.words)
            rows = [[_safe(cell) for cell in row] for row in (block.headings, *block.rows)]
            rows.insert(1, rule)
            lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            return f"{_safe(block.caption)}\n\n{lines}"
        case Picture():
            return f"![{_safe(block.alt)}]({folder}/{block.name}.svg)\n\n{_safe(block.alt)}"


def _fenced(text: str) -> str:
    """A block of code whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
