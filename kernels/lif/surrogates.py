"""Surrogate gradients: what stands in for the derivative of the spike s = (u >= 0), u = membrane - threshold.

Each is a pure function of ``u`` (any shape, floating point) and the sharpness ``alpha``, and returns the
derivative in u's shape and dtype. The C kernels hold the same formulas under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import KernelError, nearest

Derivative = Callable[[Tensor, float], Tensor]


def atan(u: Tensor, alpha: float) -> Tensor:
    """Derivative of arctan(pi/2 alpha u) / pi + 1/2: alpha/2 / (1 + (pi/2 alpha u)^2) (Fang et al. 2021)."""
    return (alpha / 2) / (1 + (math.pi / 2 * alpha * u) ** 2)


def sigmoid(u: Tensor, alpha: float) -> Tensor:
    """Derivative of the logistic function of alpha u: alpha s (1 - s) (Zenke and Ganguli 2018)."""
    # s (1 - s) = e / (1 + e)^2 with e = exp(-|alpha u|): no cancellation for large |u|.
    e = torch.exp(-(alpha * u).abs())
    return alpha * e / (1 + e) ** 2


def triangle(u: Tensor, alpha: float) -> Tensor:
    """A triangle of unit area: alpha max(0, 1 - |alpha u|) (Bellec et al. 2018)."""
    return alpha * (1 - (alpha * u).abs()).clamp(min=0)


def straight_through(u: Tensor, alpha: float) -> Tensor:
    """One everywhere, whatever ``alpha`` (Bengio et al. 2013)."""
    return torch.ones_like(u)


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {"atan": atan, "sigmoid": sigmoid, "triangle": triangle, "straight_through": straight_through}
)


def derivative(surrogate: str | Derivative) -> Derivative:
    """The function of a surrogate's name; a function is returned as it is.

    Raises:
        KernelError: the name is unknown.
    """
    if not isinstance(surrogate, str):
        return surrogate
    if surrogate not in DERIVATIVES:
        raise KernelError(nearest("surrogate", surrogate, DERIVATIVES))
    return DERIVATIVES[surrogate]


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: Derivative, alpha: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.slope, ctx.alpha = slope, alpha
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grad * ctx.slope(u, ctx.alpha), None, None


def spike(u: Tensor, surrogate: str | Derivative = "atan", alpha: float = 2.0) -> Tensor:
    """Heaviside step with a surrogate gradient.

    Args:
        u: membrane minus threshold, any shape, floating point.
        surrogate: a name of :data:`DERIVATIVES` or a function (u, alpha) -> derivative.
        alpha: sharpness of the surrogate.

    Returns:
        1 where u >= 0, else 0, in u's shape and dtype.
    """
    return _Spike.apply(u, derivative(surrogate), alpha)  # type: ignore[no-any-return,no-untyped-call]
