"""How a projection holds its weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from spikelm.errors import ConfigError, nearest

FLOAT: Mapping[str, Any] = MappingProxyType({"name": "float"})


def build_weights(spec: Mapping[str, Any], in_features: int, out_features: int) -> nn.Module:
    """The matrix of a projection.

    Args:
        spec: {"name": "float"}: an ``nn.Linear`` without bias.
        in_features: D.
        out_features: D'.

    Raises:
        ConfigError: an unknown name or option.
    """
    if spec["name"] != "float":
        raise ConfigError(nearest("kind of weights", spec["name"], ["float"]))
    for option in spec:
        if option != "name":
            raise ConfigError(nearest("option of float weights", option, []))
    return nn.Linear(in_features, out_features, bias=False)
