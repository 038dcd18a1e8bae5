"""What all pictures share: colours for every eye, a light and a dark paper, PNG and SVG files.

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color, 2008) and the maps cividis and PuOr, which people
with any colour vision tell apart. Figures are made without pyplot, so nothing global changes.
"""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spikelm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Beside the colours, so that series differ in print, too."""
ENDINGS = (".png", ".svg")
_DPI = 130
_LONGEST = 48
"""Characters of a name that fit beside a curve."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of paper and ink."""

    paper: str
    ink: str
    faint: str


LIGHT = Theme(paper="#ffffff", ink="#1c1e21", faint="#c9ccd1")
DARK = Theme(paper="#17191c", ink="#e6e7e9", faint="#4a4e55")


@contextmanager
def on(theme: Theme) -> Iterator[None]:
    """Draw in the colours of a theme."""
    import matplotlib
    from cycler import cycler

    settings: dict[str, Any] = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": "auto",
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "legend.facecolor": theme.paper,
        "legend.edgecolor": theme.faint,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10.0,
        "axes.titlesize": 11.0,
        "svg.hashsalt": "spikelm",  # the same numbers give the same file
    }
    # Releases differ in how they type the names of settings.
    with matplotlib.rc_context(cast(Any, settings)):
        yield


def blank(width: float = 7.0, height: float = 4.0) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def check_ending(path: Path) -> Path:
    """The path, where its ending names a format.

    Raises:
        ConfigError: it does not.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(
            f"cannot write {path}: pictures are PNG or SVG; use a name that ends in .png or .svg"
        )
    return path


def save(figure: Figure, path: str | Path) -> Path:
    """Write a picture, PNG or SVG by the file's ending; missing folders are made.

    Raises:
        ConfigError: another ending, or the file cannot be written.
    """
    target = check_ending(Path(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(rendered(figure, target.suffix.lower().removeprefix(".")))
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def rendered(figure: Figure, form: str) -> bytes:
    """A picture as the bytes of a ``png`` or ``svg`` file; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    stamp = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "spikelm"}):
        # Tokens of any script occur; what the font lacks is shown as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=form, dpi=_DPI, metadata=stamp)
    return buffer.getvalue()


def plain(text: str, longest: int | None = _LONGEST) -> str:
    """Text as it is shown in a picture: no control characters, no mathematics, not too long.

    Line breaks and tabs are written as in Python, other characters without a shape as their code.
    """
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    shown = "".join(
        named.get(c, c if unicodedata.category(c)[0] not in "CZ" or c == " " else f"<{ord(c):x}>")
        for c in text
    )
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown.replace("$", r"\$")


def legend(axes: Any, entries: int) -> None:
    """A legend where there is more than one curve, in small type where there are many."""
    if entries > 1:
        axes.legend(fontsize=9 if entries <= 6 else 7, frameon=True)


def token_ticks(axes: Any, tokens: Sequence[str], most: int = 64) -> None:
    """Tokens below the x axis where they fit."""
    if 0 < len(tokens) <= most:
        labels = [plain(text, 12) for text in tokens]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")
