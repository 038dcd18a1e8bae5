"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import gla, wkv4

__all__ = ["gla", "wkv4"]
