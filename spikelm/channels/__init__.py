"""Channels: parts that mix the features of a token."""

from __future__ import annotations

from spikelm.channels import mlp, moe, rwkv, swiglu

__all__ = ["mlp", "moe", "rwkv", "swiglu"]
