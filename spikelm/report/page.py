"""A document as one HTML file that needs nothing else: no script, no other file, no network.

Pictures are inlined as data URIs, each for light and for dark paper; the browser takes the one that fits.
Every text goes through :func:`html.escape`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from spikelm.report.document import Block, Command, Document, Lines, Picture, Section, Table, Text

Pictures = Mapping[str, tuple[bytes, bytes]]
"""Name of a picture -> SVG for light and for dark paper."""

_SHORT = 28
"""Characters of words that are not broken into lines."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(document: Document, pictures: Pictures) -> str:
    """The whole file."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    titles = [section.title for section in document.sections]
    if document.missing:
        titles.append("Not measured")
    links = "".join(f'<li><a href="#{anchor(title)}">{_safe(title)}</a></li>' for title in titles)
    body = "\n".join(_section(section, pictures) for section in document.sections)
    if document.missing:
        items = "".join(f"<li>{_safe(item)}</li>" for item in document.missing)
        body += (
            f'\n<section class="missing"><h2 id="{anchor("Not measured")}">Not measured</h2>'
            f"<ul>{items}</ul></section>"
        )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_safe(document.title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{_safe(document.title)}</h1><p>{_safe(document.lead)}</p></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
</body>
</html>
"""


def anchor(title: str) -> str:
    """A section's id: ``Loss by position`` -> ``loss-by-position``."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in title.lower()).split())


def _safe(text: str) -> str:
    # HTML has no place for control characters, escaped or not.
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))


def _section(section: Section, pictures: Pictures) -> str:
    name = anchor(section.title)
    blocks = "\n".join(
        _block(block, pictures, f"{name}-{index}") for index, block in enumerate(section.blocks, start=1)
    )
    return f'<section><h2 id="{name}">{_safe(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block, pictures: Pictures, name: str) -> str:
    match block:
        case Text():
            return f"<p>{_safe(block.text)}</p>"
        case Lines():
            return "<ul>" + "".join(f"<li>{_safe(item)}</li>" for item in block.items) + "</ul>"
        case Command():
            return f"<pre><code>{_safe(block.text)}</code></pre>"
        case Table():
            return _table(block, name)
        case Picture():
            light, dark = (_uri(svg) for svg in pictures[block.name])
            return (
                f'<figure><div class="scroll" tabindex="0"><picture>'
                f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
                f'<img src="{light}" alt="{_safe(block.alt)}"></picture></div>'
                f"<figcaption>{_safe(block.alt)}</figcaption></figure>"
            )


def _table(table: Table, name: str) -> str:
    # A caption inside would be as wide as its table, which may be wider than the screen.
    head = _row(table, table.headings, "th")
    body = "\n".join(_row(table, cells, "td") for cells in table.rows)
    return (
        f'<p class="caption" id="{name}">{_safe(table.caption)}</p>'
        f'<div class="scroll" tabindex="0"><table aria-labelledby="{name}">'
        f"<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(table: Table, cells: Sequence[str], tag: str) -> str:
    shown = []
    for index, cell in enumerate(cells):
        kind = "" if index >= table.words else "long" if len(cell) > _SHORT else "word"
        attribute = f' class="{kind}"' if kind else ""
        shown.append(f"<{tag}{attribute}>{_safe(cell)}</{tag}>")
    return f"<tr>{''.join(shown)}</tr>"


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"
