"""WikiText as others report it: by page, counted on the original text, read after detokenising.

The release spaces out punctuation (``film , television``) and marks joined numbers and words (``@-@``).
lm-evaluation-harness feeds models a page with that undone and divides by the words and bytes of the page as
it was; a figure is comparable with published ones only in that way. The rules are those of its task
``wikitext`` (version 2), one line each; its rule for an apostrophe before a digit has slashes in its pattern
and matches no text, so it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_PUNCTUATION = ":;.!?,"
_BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"))

# In this order: brackets are closed up after the commas inside them, headings before line ends.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("s '"), "s'"),
    (re.compile(" @([-,.])@ "), r"\1"),
    *((re.compile(f" [{mark}] "), f"{mark} ") for mark in _PUNCTUATION),
    *((re.compile(rf"\{a}\s*([^\{b}]*?)\s*\{b}"), rf"{a}\1{b}") for a, b in _BRACKETS),
    *((re.compile(rf"{quote}\s*([^{quote}]*?)\s*{quote}"), rf"{quote}\1{quote}") for quote in "\"'"),
    (re.compile("= = = ="), "===="),
    (re.compile("= = ="), "==="),
    (re.compile("= ="), "=="),
    (re.compile(" ° "), "°"),
    (re.compile(" \n"), "\n"),
    (re.compile("\n "), "\n"),
    (re.compile(" N "), " 1 "),
    (re.compile(" 's"), "'s"),
)


def pages(text: str) -> Iterator[str]:
    """The pages of a WikiText file: each begins with a heading of the first level, `` = Title = ``.

    Args:
        text: content of ``wiki.test.raw`` or a file like it.

    Yields:
        Pages that are not blank, without the line end before the next heading.
    """
    page: list[str] = []
    for line in text.split("\n"):
        if _is_title(line):
            if "".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "\n".join(page)


def _is_title(line: str) -> bool:
    words = line.strip()
    return re.fullmatch("= [^=].* =", words) is not None and not words.endswith("= =")


def detokenised(page: str) -> str:
    """A page with the spaces and marks of WikiText's tokenisation undone."""
    for pattern, replacement in _RULES:
        page = pattern.sub(replacement, page)
    return page


def words(page: str) -> int:
    """Words of an original page as lm-evaluation-harness counts them: pieces between runs of white space."""
    return len(re.split(r"\s+", page))
