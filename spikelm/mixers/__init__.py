"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import attention, gated_delta, gla, parallel, sdsa, ssa, swa, wkv4

__all__ = ["attention", "gated_delta", "gla", "parallel", "sdsa", "ssa", "swa", "wkv4"]
