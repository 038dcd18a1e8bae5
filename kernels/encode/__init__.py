"""Adaptive spike encoding: floating activations to integer counts and one threshold per row.

Forms: reference.py (the equations), eager.py (plain torch), c.py and op.c (CPUs), triton*.py (GPUs).
Equations are written in reference.py. Source: SpikingBrain, https://arxiv.org/abs/2509.05276, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.encode import autograd, eager, reference

__all__ = ["LARGEST", "adaptive_encode", "adaptive_encode_int8", "decode_counts"]

LARGEST = 127
"""Largest |count| that int8 holds (-128 is never used)."""


def _triton(x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    from spikelm.kernels.encode import triton

    found: tuple[Tensor, Tensor] = triton.adaptive_encode(x, k, dead_zone, cap, mean)
    return found


def _triton_int8(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from spikelm.kernels.encode import triton

    found: tuple[Tensor, Tensor, Tensor] = triton.adaptive_encode_int8(x, k, dead_zone, cap, mean)
    return found


def _triton_decode(counts: Tensor, threshold: Tensor) -> Tensor:
    from spikelm.kernels.encode import triton

    found: Tensor = triton.decode_counts(counts, threshold)
    return found


_Form = Callable[[Tensor, float, float, int, Tensor | None], tuple[Tensor, Tensor]]
_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "reference": reference.adaptive_encode,
        "torch": eager.adaptive_encode,
        "c": autograd.adaptive_encode,
        "triton": _triton,
    }
)
_Int8Form = Callable[[Tensor, float, float, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]
_INT8_FORMS: Mapping[str, _Int8Form] = MappingProxyType(
    {
        "reference": reference.adaptive_encode_int8,
        "torch": reference.adaptive_encode_int8,
        "c": autograd.adaptive_encode_int8,
        "triton": _triton_int8,
    }
)
_DecodeForm = Callable[[Tensor, Tensor], Tensor]
_DECODE_FORMS: Mapping[str, _DecodeForm] = MappingProxyType(
    {
        "reference": reference.decode_counts,
        "torch": reference.decode_counts,
        "c": autograd.decode_counts,
        "triton": _triton_decode,
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
            constant.

    Returns:
        counts [.., D] and threshold [.., 1], float32 (float64 for float64). The gradient is
        straight-through, d(n V)/dx = 1 and zero where the cap bites; the threshold counts as constant.

    Raises:
        ShapeError: x is a scalar or not floating.
        KernelError: a k that is not above 0, a dead zone below 0, a cap below 1, one of them NaN, or a
            back-end that was asked for and is not available.
    """
    _check("adaptive_encode", x, mean, k, dead_zone, cap)
    name, dtype = _choose(x, "encode"), _working_dtype(x)
    given = None if mean is None else mean.detach().to(dtype)
    # GPU kernels read half precision as it is.
    return _FORMS[name](x if name == "triton" else x.to(dtype), k, dead_zone, cap, given)


def adaptive_encode_int8(
    x: Tensor, *, k: float, dead_zone: float = 0.0, cap: int = LARGEST, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The counts of :func:`adaptive_encode` as int8, with what a meter wants to know of them; no gradient.

    In one form the counts and thresholds are those of :func:`adaptive_encode`, bit for bit. int8 has no NaN:
    where that function gives one, the count here is 0, and the row's threshold is NaN (an infinity in x:
    infinite), so that count times threshold is NaN as there.

    Args:
        x: [.., D]; bfloat16 and float16 are encoded in float32.
        k: counts of an element of mean magnitude; V = mean|x| / k over the last dimension, at least 1e-8.
        dead_zone: counts are zero where |x| < dead_zone * mean|x|.
        cap: |count| <= cap, from 1 to 127.
        mean: [.., 1], mean|x| of the whole rows where x holds only a part of them.

    Returns:
        counts int8 [.., D], threshold [.., 1] float32 (float64 for float64) and statistics int64 [.., 4] of
        each row: silent channels (count 0), sum of |count|, counts that the cap cut off, largest |count|.

    Raises:
        ShapeError: x is a scalar or not floating, or ``mean`` does not fit.
        KernelError: a k that is not above 0, a dead zone below 0, one of them NaN, a cap beyond int8, or a
            back-end that was asked for and is not available.
    """
    if not 1 <= cap <= LARGEST:
        raise KernelError(f"adaptive_encode_int8 got cap {cap}; int8 counts need one from 1 to {LARGEST}")
    _check("adaptive_encode_int8", x, mean, k, dead_zone, cap)
    name, dtype, x = _choose(x, "encode_int8"), _working_dtype(x), x.detach()
    given = None if mean is None else mean.detach().to(dtype)
    return _INT8_FORMS[name](x if name == "triton" else x.to(dtype), k, dead_zone, cap, given)


def decode_counts(counts: Tensor, threshold: Tensor) -> Tensor:
    """What the counts stand for, n V: the straight-through partner of :func:`adaptive_encode`.

    Args:
        counts: [.., D], int8 or floating.
        threshold: [.., 1], float32 or float64; a constant for the gradient.

    Returns:
        counts * threshold [.., D] in the threshold's dtype. The gradient of floating counts is
        grad * threshold.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        KernelError: a back-end that was asked for and is not available.
    """
    _check_decode(counts, threshold)
    name = choose("encode", counts.device, kernel="decode", dtype=counts.dtype)
    return _DECODE_FORMS[name](counts, threshold)


def _choose(x: Tensor, kernel: str) -> str:
    name = choose("encode", x.device, kernel=kernel, dtype=x.dtype)
    # GPU kernels compute in float32.
    return "torch" if name == "triton" and x.dtype == torch.float64 and backend() == AUTO else name


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_decode(counts: Tensor, threshold: Tensor) -> None:
    if counts.dim() == 0 or not (counts.dtype == torch.int8 or counts.is_floating_point()):
        raise ShapeError(
            f"decode_counts needs int8 or floating counts [.., D], got {counts.dtype} {list(counts.shape)}"
        )
    if (
        threshold.shape != (*counts.shape[:-1], 1)
        or threshold.dtype not in (torch.float32, torch.float64)
        or threshold.device != counts.device
    ):
        raise ShapeError(
            f"decode_counts needs a threshold {[*counts.shape[:-1], 1]} of float32 or float64 on "
            f"{counts.device}, got {threshold.dtype} {list(threshold.shape)} on {threshold.device}"
        )


def _check(name: str, x: Tensor, mean: Tensor | None, k: float, dead_zone: float, cap: int) -> None:
    if not (0 < k < torch.inf and 0 <= dead_zone < torch.inf and cap >= 1):
        raise KernelError(
            f"{name} got k={k}, dead_zone={dead_zone}, cap={cap}; "
            "expected a finite k above 0, a finite dead zone of at least 0 and a cap of at least 1"
        )
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(f"{name} needs floating x [.., D], got {x.dtype} {list(x.shape)}")
    if mean is not None and (
        mean.shape != (*x.shape[:-1], 1) or not mean.is_floating_point() or mean.device != x.device
    ):
        raise ShapeError(
            f"mean must be floating {[*x.shape[:-1], 1]} on {x.device} for x {list(x.shape)}, "
            f"got {mean.dtype} {list(mean.shape)} on {mean.device}"
        )
