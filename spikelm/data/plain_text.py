"""Checks and cuts of text before tokenising."""

from __future__ import annotations

from collections.abc import Iterator

from spikelm.errors import DataError

CHUNK_CHARS = 1 << 16


def utf8(text: str) -> bytes:
    """``text`` as UTF-8; raises :class:`DataError` that names the first lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is a lone surrogate (U+{ord(text[error.start]):04X}), "
            "which no UTF-8 text can hold; remove it"
        ) from error


def checked(text: str) -> str:
    """``text`` itself once it is known to be Unicode; raises like :func:`utf8`."""
    if not text.isascii():
        utf8(text)
    return text


def split_lines(text: str, chunk: int = CHUNK_CHARS) -> Iterator[str]:
    """Cut ``text`` into parts of about ``chunk`` characters; the parts joined are the text.

    Cuts only after a line break that follows a visible character and precedes an ASCII letter: there the
    word splitting of GPT-2 and its descendants is the same with and without the cut.
    """
    start = 0
    while len(text) - start > 2 * chunk:
        cut = start + chunk
        while True:
            cut = text.find("\n", cut) + 1
            if cut == 0 or cut >= len(text):
                cut = len(text)
                break
            if text[cut].isascii() and text[cut].isalpha() and not text[cut - 2].isspace():
                break
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
