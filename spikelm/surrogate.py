"""The spike function: a step forward, a surrogate derivative backward.

Neftci, Mostafa and Zenke 2019 (arXiv 1901.09948), equation 5 and following. The derivatives themselves are
in ``spikelm.kernels.lif.surrogates``, so that the C and Triton kernels and this function share one table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikelm.errors import ConfigError, nearest
from spikelm.kernels.lif.surrogates import SURROGATES


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, surrogate: str, alpha: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate, ctx.alpha = surrogate, alpha
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * SURROGATES[ctx.surrogate](u, ctx.alpha), None, None


def spike(u: Tensor, surrogate: str = "atan", alpha: float = 2.0) -> Tensor:
    """1 where u >= 0, else 0, with the named surrogate as derivative.

    Args:
        u: membrane minus threshold, any shape and floating dtype.
        surrogate: ``atan``, ``sigmoid``, ``triangle`` or ``straight_through``.
        alpha: sharpness of the surrogate.
    """
    spikes: Tensor = _Spike.apply(u, surrogate, alpha)
    return spikes


def check_surrogate(surrogate: str, alpha: float) -> None:
    """Raise ConfigError for an unknown surrogate or a sharpness that is not positive."""
    if surrogate not in SURROGATES:
        raise ConfigError(nearest("surrogate", surrogate, SURROGATES))
    if not alpha > 0:
        raise ConfigError(f"surrogate sharpness alpha is {alpha}; expected a positive number")
