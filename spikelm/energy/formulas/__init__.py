"""Formulas of the package's own parts; importing this registers them."""

from __future__ import annotations

from spikelm.energy.formulas import attention, channels, linear_attention, neurons, structure

__all__ = ["attention", "channels", "linear_attention", "neurons", "structure"]
