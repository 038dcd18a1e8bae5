"""Adaptive spike encoding: floating activations to integer counts and one threshold per row."""

from __future__ import annotations

from spikelm.kernels.encode.autograd import adaptive_encode

__all__ = ["adaptive_encode"]
