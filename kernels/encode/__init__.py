"""Adaptive spike encoding: floating activations to integer counts and one threshold per row.

Forms: reference.py (the equations), eager.py (plain torch), c.py and op.c (CPUs). Equations are written in
reference.py. Source: SpikingBrain, https://arxiv.org/abs/2509.05276, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import backend, choose
from spikelm.kernels.encode import autograd, eager, reference

__all__ = ["adaptive_encode"]

_Form = Callable[[Tensor, float, float, int], tuple[Tensor, Tensor]]
_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "reference": reference.adaptive_encode,
        "torch": eager.adaptive_encode,
        "c": autograd.adaptive_encode,
    }
)


def adaptive_encode(
    x: Tensor, *, k: float, dead_zone: float = 0.0, cap: int = 127, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Integer counts n and threshold V with n V ~ x: V = mean|x| / k, n = round(x / V), half to even.

    Forms may differ in the last bit of the mean, and then in a count whose x / V lies that close to a half.
    In C a row gives the same bits in any batch and with any number of threads. A NaN in a row makes its
    threshold and all its counts NaN; an infinity makes the threshold infinite and its own count NaN.

    Args:
        x: [.., D]; bfloat16 and float16 are encoded in float32.
        k: counts of an element of mean magnitude; V = mean|x| / k over the last dimension, at least 1e-8.
        dead_zone: counts are zero where |x| < dead_zone * mean|x|.
        cap: |count| <= cap.
        mean: [.., 1], mean|x| of the whole rows where x holds only a part of them (tensor parallelism); a
            constant. The C form does not take it: auto uses the torch form then, with the same bits.

    Returns:
        counts [.., D] and threshold [.., 1], float32 (float64 for float64). The gradient is
        straight-through, d(n V)/dx = 1 and zero where the cap bites; the threshold counts as constant.

    Raises:
        ShapeError: x is a scalar or not floating.
        KernelError: a back-end that was asked for and is not available, or the C form with ``mean``.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(f"adaptive_encode needs floating x [.., D], got {x.dtype} {list(x.shape)}")
    name, x = choose("encode", x.device), x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if mean is None:
        return _FORMS[name](x, k, dead_zone, cap)
    if mean.shape != (*x.shape[:-1], 1):
        raise ShapeError(f"mean is {list(mean.shape)}; expected {[*x.shape[:-1], 1]} for x {list(x.shape)}")
    if name == "c" and backend() == "c":
        raise KernelError("the C form of encode takes no mean of whole rows; use auto or torch")
    given = reference.adaptive_encode if name == "reference" else eager.adaptive_encode
    return given(x, k, dead_zone, cap, mean.detach().to(x.dtype))
