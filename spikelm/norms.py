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
