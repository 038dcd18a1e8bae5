"""Adaptive spike encoding: floating activations to integer counts and one threshold per row.

Forms: reference.py (the equations), eager.py (plain torch), c.py and op.c (CPUs). Equations are written in
reference.py. Source: SpikingBrain, https://arxiv.org/abs/2509.05276, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import choose
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


def adaptive_encode(x: Tensor, *, k: float, dead_zone: float = 0.0, cap: int = 127) -> tuple[Tensor, Tensor]:
    """Integer counts n and threshold V with n V ~ x: V = mean|x| / k, n = round(x / V), half to even.

    Forms may differ in the last bit of the mean, and then in a count whose x / V lies that close to a half.
    In C a row gives the same bits in any batch and with any number of threads. A NaN in a row makes its
    threshold and all its counts NaN; an infinity makes the threshold infinite and its own count NaN.

    Args:
        x: [.., D]; bfloat16 and float16 are encoded in float32.
        k: counts of an element of mean magnitude; V = mean|x| / k over the last dimension, at least 1e-8.
        dead_zone: counts are zero where |x| < dead_zone * mean|x|.
        cap: |count| <= cap.

    Returns:
        counts [.., D] and threshold [.., 1], float32 (float64 for float64). The gradient is
        straight-through, d(n V)/dx = 1 and zero where the cap bites; the threshold counts as constant.

    Raises:
        ShapeError: x is a scalar or not floating.
        KernelError: a back-end that was asked for and is not available.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(f"adaptive_encode needs floating x [.., D], got {x.dtype} {list(x.shape)}")
    form = _FORMS[choose("encode", x.device)]
    return form(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), k, dead_zone, cap)
