"""Neurons: what turns activations into spikes. See :class:`spikelm.neurons.base.Neuron` for the contract."""

from __future__ import annotations

from spikelm.neurons import adaptive, heaviside, lif, none
from spikelm.neurons.base import Neuron, RateTarget, build_neuron

__all__ = ["Neuron", "RateTarget", "adaptive", "build_neuron", "heaviside", "lif", "none"]
