"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import attention, gla, parallel, sdsa, ssa, swa, wkv4

__all__ = ["attention", "gla", "parallel", "sdsa", "ssa", "swa", "wkv4"]
