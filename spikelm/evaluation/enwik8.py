"""enwik8: the first 10^8 bytes of an English Wikipedia dump, split 90 : 5 : 5 million bytes.

Figures are published in bits per byte and in bits per character of UTF-8, which are not the same: there are
fewer characters than bytes. Both are given from the same nats.
"""

from __future__ import annotations

from pathlib import Path

from spikelm.data.compressed import decode_utf8, open_bytes
from spikelm.errors import DataError

SIZE = 100_000_000
PARTS = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, SIZE)}


def read(path: Path, split: str) -> str:
    """One part of the file.

    A part that would begin within a character begins at the next one, and the part before it ends there, so
    that together they are the whole file; of a character that the end of the file cuts off nothing is kept.

    Args:
        path: ``enwik8``, also compressed.
        split: ``train``, ``valid`` or ``test``.

    Raises:
        DataError: the file has another size, or is not UTF-8.
    """
    begin, end = PARTS[split]
    with open_bytes(path) as file:
        left = begin
        while left and (skipped := len(file.read(min(left, 1 << 24)))):
            left -= skipped
        # Three bytes more: as long as the rest of a character can be.
        raw = file.read(end - begin + 3)
        size = begin - left + len(raw)
        while piece := file.read(1 << 24):
            size += len(piece)
    if size != SIZE:
        raise DataError(f"{path} has {size:,} bytes where enwik8 has {SIZE:,}; copy or download it again")
    return cut(raw, end - begin, str(path), begin)


def cut(raw: bytes, length: int, where: str, offset: int = 0) -> str:
    """The characters that begin in the first ``length`` bytes.

    Args:
        raw: those bytes and up to three that follow.
        length: bytes of the part.
        where: name for messages.
        offset: position of ``raw`` in the file; at 0 nothing is left out at its start.

    Raises:
        DataError: it is not UTF-8.
    """
    begin = 0
    if offset:
        while begin < min(3, len(raw)) and _continues(raw[begin]):
            begin += 1
    end = min(length, len(raw))
    while end < len(raw) and _continues(raw[end]):
        end += 1
    part = raw[begin:end]
    try:
        return part.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(part) and len(raw) <= length:
            return part[: error.start].decode("utf-8")
        return decode_utf8(part, where, offset + begin)  # raises, and names the byte


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80
