"""Normalisation layers by the name a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from spikelm.config import ModelConfig

_NORMS: Mapping[str, Callable[[int, float], nn.Module]] = MappingProxyType(
    {
        "layernorm": lambda features, epsilon: nn.LayerNorm(features, epsilon),
        "rmsnorm": lambda features, epsilon: nn.RMSNorm(features, epsilon),
    }
)


def make_norm(config: ModelConfig, features: int) -> nn.Module:
    """The configuration's norm over the last ``features`` dimensions."""
    return _NORMS[config.norm](features, config.layer_norm_epsilon)


SPARSE_EPSILON = 1e-3
"""Epsilon of a norm behind spikes: 1e-5 would multiply the gradient of a token without any by 316."""


def behind_spikes(norm: nn.Module) -> nn.Module:
    """The norm with an epsilon for inputs that may have no variance: sums of a few spikes, or of none."""
    for module in norm.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.eps = max(module.eps or 0.0, SPARSE_EPSILON)
    return norm
