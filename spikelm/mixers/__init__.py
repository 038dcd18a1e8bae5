"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import gla, parallel, wkv4

__all__ = ["gla", "parallel", "wkv4"]
