"""Decoding token by token: text comes out as soon as its characters are complete."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

_LONGEST = 32  # tokens that may wait for a character to become complete (UTF-8 needs four)


class DecodeStream(Protocol):
    """Turns token ids into text piece by piece; the pieces joined are the decoded text."""

    def push(self, token: int) -> str:
        """Text completed by ``token``; empty while a multi-byte character is incomplete."""
        ...

    def finish(self) -> str:
        """What is left at the end: a replacement character where a character stayed incomplete."""
        ...


class ByteStream:
    """Decode stream of a byte-level tokenizer: an incremental UTF-8 decoder.

    Args:
        piece: gives the bytes of a token id.
    """

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """See :class:`DecodeStream`."""
        return self._decoder.decode(self._piece(token))

    def finish(self) -> str:
        """See :class:`DecodeStream`."""
        return self._decoder.decode(b"", final=True)


class TextStream:
    """Decode stream of any other tokenizer: the new text is what one more token adds to the decoded text.

    A few tokens at most are decoded again for each new one: where very many in a row complete no character
    (bytes that are not UTF-8, special tokens), what they decode to is returned as it is.

    Args:
        decode: decodes a list of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last ones returned, kept for the spacing, and those not yet returned
        self._returned = 0  # how many at the front of _ids were returned

    def push(self, token: int) -> str:
        """See :class:`DecodeStream`."""
        self._ids.append(token)
        before = self._decode(self._ids[: self._returned])
        text = self._decode(self._ids)
        waiting = len(self._ids) - self._returned
        if waiting < _LONGEST and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._ids = self._ids[self._returned :]
        self._returned = len(self._ids)
        return text[len(before) :]

    def finish(self) -> str:
        """See :class:`DecodeStream`."""
        before = self._decode(self._ids[: self._returned])
        text = self._decode(self._ids)
        self._returned = len(self._ids)
        return text[len(before) :]
