"""Spike codings: how an integer count is sent as events over micro-steps. See :mod:`spikelm.codings.base`."""

from __future__ import annotations

from spikelm.codings import bidirectional, binary, bitwise, ternary, twos_complement
from spikelm.codings.base import Coding, build_coding, needed_limit

__all__ = [
    "Coding",
    "bidirectional",
    "binary",
    "bitwise",
    "build_coding",
    "needed_limit",
    "ternary",
    "twos_complement",
]
