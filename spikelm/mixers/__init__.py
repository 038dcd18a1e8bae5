"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import parallel, wkv4

__all__ = ["parallel", "wkv4"]
