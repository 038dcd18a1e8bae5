"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import sdsa, ssa, wkv4

__all__ = ["sdsa", "ssa", "wkv4"]
