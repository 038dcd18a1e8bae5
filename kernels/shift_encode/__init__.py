"""Norm, token shift and spike encoding in one pass: everything between a residual and its projections.

For RWKV's mixers and channels: M projections read the normalised token mixed with the one before it, each
with mixing weights of its own, as integer counts. Forms: reference.py (the equations), eager.py (plain
torch), c.py and op.c (CPUs).
Sources: Peng et al. 2023 (RWKV), https://arxiv.org/abs/2305.13048, equations 11 to 16 (token shift);
SpikingBrain, https://arxiv.org/abs/2509.05276, section 3.3 (encoding).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError, nearest
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.encode import LARGEST
from spikelm.kernels.masks import check_masks
from spikelm.kernels.shift_encode import c, eager, reference
from spikelm.kernels.shift_encode.options import NORMS, Norm, Options

__all__ = ["NORMS", "shift_encode"]

Number = TypeVar("Number", int, float)


def _triton(
    x: Tensor,
    norm: Norm,
    last: Tensor,
    mixes: Tensor,
    options: Options,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from spikelm.kernels.shift_encode import triton

    found: tuple[Tensor, Tensor, Tensor, Tensor] = triton.shift_encode(
        x, norm, last, mixes, options, reset, valid
    )
    return found


def _choose(x: Tensor, kind: str) -> str:
    name = choose("shift_encode", x.device, dtype=x.dtype, norm=kind)
    if name != "triton" or backend() != AUTO:
        return name
    from spikelm.kernels.shift_encode import triton

    return "triton" if triton.check(x) is None else "torch"


_Form = Callable[
    [Tensor, Norm, Tensor, Tensor, Options, Tensor | None, Tensor | None],
    tuple[Tensor, Tensor, Tensor, Tensor],
]
_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "reference": reference.shift_encode,
        "torch": eager.shift_encode,
        "c": c.shift_encode,
        "triton": _triton,
    }
)


def shift_encode(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    kind: str,
    last: Tensor,
    mixes: Tensor,
    *,
    k: float | Sequence[float],
    dead_zone: float | Sequence[float] = 0.0,
    cap: int | Sequence[int] = LARGEST,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts of lerp(previous, z, mix_m) for each of M projections, z = norm(x); inference only, no gradient.

    ``previous`` is z of the last valid token before, ``last`` for the first one, and 0 after a reset. The
    result does not depend on where a sequence is split, in C to the bit.

    Args:
        x: residual stream [B, T, D], any floating dtype.
        norm_weight: [D].
        norm_bias: [D], or None (``rmsnorm`` has none).
        eps: added to the variance (``layernorm``) or the mean square (``rmsnorm``).
        kind: ``layernorm`` or ``rmsnorm``.
        last: [B, D], normalised features of the last valid token before x; zeros at the start.
        mixes: [M, D], share of the current token: lerp(previous, z, mix) = previous + mix (z - previous).
        k: counts of an element of mean magnitude, for all projections or one for each of the M.
        dead_zone: counts are zero where |.| < dead_zone * mean|.|; one or M.
        cap: |count| <= cap, from 1 to 127; one or M.
        reset: bool [B, T]; where true the previous token is zero.
        valid: bool [B, T]; where false the token is passed over: counts 0, threshold 1e-8, statistics 0.

    Returns:
        counts int8 [M, B, T, D], thresholds [M, B, T, 1], new ``last`` [B, D], and statistics int64
        [M, B, T, 4] as in :func:`~spikelm.kernels.encode.adaptive_encode_int8`. Float tensors are float32
        (float64 for float64 x), computed in that dtype throughout.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        KernelError: an unknown norm, options out of range, or a back-end that was asked for and is not
            available.
    """
    _check(x, norm_weight, norm_bias, kind, last, mixes, reset, valid)
    options = _options(mixes.shape[0], k, dead_zone, cap)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = None if norm_bias is None else norm_bias.detach().to(dtype)
    norm = Norm(kind=kind, weight=norm_weight.detach().to(dtype), bias=bias, eps=eps)
    name, x = _choose(x, kind), x.detach()
    x = x if name == "triton" else x.to(dtype)  # GPU kernels read half precision as it is
    return _FORMS[name](x, norm, last.detach().to(dtype), mixes.detach().to(dtype), options, reset, valid)


def _options(
    count: int, k: float | Sequence[float], dead_zone: float | Sequence[float], cap: int | Sequence[int]
) -> Options:
    """The options of each of the projections, checked."""
    options = Options(
        k=_per_projection("k", k, count),
        dead_zone=_per_projection("dead_zone", dead_zone, count),
        cap=_per_projection("cap", cap, count),
    )
    for most in options.cap:
        if not 1 <= most <= LARGEST:
            raise KernelError(f"shift_encode got cap {most}; int8 counts need one from 1 to {LARGEST}")
    for divisor, edge in zip(options.k, options.dead_zone, strict=True):
        if not (0 < divisor < torch.inf and 0 <= edge < torch.inf):
            raise KernelError(
                f"shift_encode got k={divisor} and dead_zone={edge}; "
                "expected a finite k above 0 and a finite dead zone of at least 0"
            )
    return options


def _per_projection(name: str, value: Number | Sequence[Number], count: int) -> tuple[Number, ...]:
    if isinstance(value, int | float):
        return (value,) * count
    if len(value) != count:
        raise ShapeError(
            f"shift_encode got {len(value)} values of {name} for {count} mixes; expected as many"
        )
    return tuple(value)


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    kind: str,
    last: Tensor,
    mixes: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:
    """Everything but values. A shape or device is asked for once: that is what costs here."""
    sizes, device = x.shape, x.device
    if len(sizes) != 3 or not x.is_floating_point():
        raise ShapeError(f"shift_encode needs floating x [B, T, D], got {x.dtype} {list(x.shape)}")
    if kind not in NORMS:
        raise KernelError(nearest("norm", kind, NORMS))
    batch, _, width = sizes
    for name, tensor, shape in (
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("last", last, (batch, width)),
        ("mixes", mixes, (mixes.shape[0] if mixes.dim() else 0, width)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_floating_point() or tensor.device != device:
            raise ShapeError(
                f"shift_encode needs floating {name} {list(shape)} on {x.device} for x {list(x.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if kind == "rmsnorm" and norm_bias is not None:
        raise KernelError("shift_encode got a bias for rmsnorm, which has none; pass None")
    check_masks(x, reset, valid)
