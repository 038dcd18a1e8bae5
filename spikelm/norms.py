"""Normalisation layers by the name a configuration gives them.

Under ``no_grad`` a row of float32 gets the same bits in any batch and in decode plans
(:mod:`spikelm.kernels.rowwise`); with gradients they are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.kernels import rowwise


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        """The norm of [.., D]."""
        if _differentiated(input):
            return super().forward(input)
        return rowwise.norm(input, self.weight, self.bias, self.eps, "layernorm")


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        """The norm of [.., D]."""
        if _differentiated(input):
            return super().forward(input)
        epsilon = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        return rowwise.norm(input, self.weight, None, epsilon, "rmsnorm")


def _differentiated(x: Tensor) -> bool:
    """Whether torch's own norm is to be used: with gradients, in other precisions, under autocast."""
    return torch.is_grad_enabled() or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)


_NORMS: Mapping[str, Callable[[int, float], nn.Module]] = MappingProxyType(
    {
        "layernorm": lambda features, epsilon: LayerNorm(features, epsilon),
        "rmsnorm": lambda features, epsilon: RMSNorm(features, epsilon),
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
