"""Files by their endings, the same bytes for the same numbers, and text that cannot break a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spikelm.errors import ConfigError
from spikelm.plots import canvas


def picture(title: str = "a", theme: canvas.Theme = canvas.LIGHT) -> Any:
    with canvas.on(theme):
        figure = canvas.blank()
        axes = figure.subplots()
        axes.plot([1, 2, 3], [3.0, float("nan"), 1.0], label=title)
        axes.set_title(title)
        axes.legend()
    return figure


def test_endings_say_the_format(tmp_path: Path) -> None:
    assert canvas.save(picture(), tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    svg = canvas.save(picture(), tmp_path / "A.SVG").read_bytes()
    assert svg.startswith(b"<?xml") and b"<svg" in svg
    for name in ("a.pdf", "a", "a.png.txt"):
        with pytest.raises(ConfigError, match="ends in .png or .svg"):
            canvas.save(picture(), tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        canvas.save(picture(), tmp_path / "file" / "a.png")


def test_the_same_figure_has_the_same_bytes() -> None:
    for form in ("png", "svg"):
        assert canvas.rendered(picture(), form) == canvas.rendered(picture(), form)
    assert canvas.rendered(picture(), "svg") != canvas.rendered(picture(theme=canvas.DARK), "svg")


def test_themes_leave_nothing_behind() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    picture(theme=canvas.DARK)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("$x^$ and \\frac{", r"\$x^\$ and \frac{"),
        ("\x07\u2028\ufeff", "<7><2028><feff>"),
        ("naïve 猫", "naïve 猫"),
        ("x" * 60, "x" * 47 + "…"),
    ],
)
def test_any_text_can_be_shown(text: str, shown: str) -> None:
    assert canvas.plain(text) == shown
    # matplotlib takes dollars for mathematics, and refuses what is none.
    assert canvas.rendered(picture(canvas.plain(text)), "png").startswith(b"\x89PNG")


def test_colours_are_apart_for_eyes_without_red_or_green_cones() -> None:
    """Every pair of curve colours differs in lightness or in the blue-yellow direction.

    Linear RGB to LMS (Smith and Pokorny, in the matrix of Vienot, Brettel and Mollon 1999), without L or M.
    """
    import numpy as np

    to_lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in canvas.COLOURS]) ** 2.2
    lms = rgb @ to_lms.T / to_lms.sum(1)
    for blind in (0, 1):
        seen = np.delete(lms, blind, axis=1)
        gaps = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
        assert min(gaps) > 0.05, (blind, min(gaps))
