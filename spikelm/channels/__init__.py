"""Channels: parts that mix the features of a token."""

from __future__ import annotations

from spikelm.channels import moe, rwkv, swiglu

__all__ = ["moe", "rwkv", "swiglu"]
