"""Mixers: parts that mix tokens."""

from __future__ import annotations

from spikelm.mixers import wkv4

__all__ = ["wkv4"]
