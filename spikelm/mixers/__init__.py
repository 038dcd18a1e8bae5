"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import parallel, sdsa, ssa, wkv4

__all__ = ["parallel", "sdsa", "ssa", "wkv4"]
