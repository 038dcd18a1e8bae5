"""Channels: parts that mix the features of a token."""

from __future__ import annotations

from spikelm.channels import rwkv, swiglu

__all__ = ["rwkv", "swiglu"]
