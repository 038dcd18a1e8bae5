"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import gated_delta, gla, parallel, wkv4

__all__ = ["gated_delta", "gla", "parallel", "wkv4"]
