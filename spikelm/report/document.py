"""What a report says, before it is HTML or Markdown: sections of text, tables, lists, commands, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spikelm.plots.canvas import Theme

ABSENT = "–"
"""What stands for a number that was not measured or is not finite."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Command:
    """Something to type."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        caption: above it.
        headings: of the columns.
        rows: cells as text.
        words: so many columns from the left hold words; the others hold numbers, which are aligned right.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, drawn once for light and once for dark paper.

    Attributes:
        name: of its file, without ending; letters, digits and hyphens.
        alt: what it shows, for those who do not see it.
        draw: makes it in the colours of a theme.
    """

    name: str
    alt: str
    draw: Callable[[Theme], Figure]


Block: TypeAlias = Text | Lines | Command | Table | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        title: of the page.
        lead: first paragraph.
        sections: in order.
        missing: what was not measured, one sentence each.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    missing: Sequence[str] = field(default_factory=tuple)


def number(value: Any, form: str = ".4g") -> str:
    """A number as text; :data:`ABSENT` where there is none; large ones in groups of three digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return ABSENT
    if form == ".4g" and 1e4 <= abs(value) < 1e15:
        return format(value, ",.0f")
    return format(value, form)


def with_error(value: Any, error: Any, form: str = ".4f") -> str:
    """``value ± error``; the error is left out where it is not known."""
    shown = number(value, form)
    if shown == ABSENT or number(error) == ABSENT:
        return shown
    return f"{shown} ± {number(error, form.removeprefix('+'))}"
