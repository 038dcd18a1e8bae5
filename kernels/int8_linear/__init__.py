"""Integer spike counts times int8 weights: exact integer sums, scaled per output channel and group of inputs.

Forms: reference.py (the equation, in integers), eager.py (plain torch), c.py with op.c and step.h (CPUs),
triton.py (GPUs). All give the same bits. packing.py lays weights out for the C form, densely or for
event-driven reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import backend, choose
from spikelm.kernels.int8_linear import c, eager, reference

__all__ = ["LONGEST", "dequantised", "in_out", "int8_linear", "integer_sums", "scaled_sums"]

LONGEST = (2**31 - 1) // eager.LARGEST**2
"""Inputs of a group whose integer sum fits int32: 133143."""

_UNSIGNED = (torch.bool, torch.uint8)
_Form = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _triton(counts: Tensor, weight: Tensor, scales: Tensor, group: int) -> Tensor:
    from spikelm.kernels.int8_linear import triton

    y: Tensor = triton.product(counts, weight, scales, group, None, None)
    return y


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {"reference": reference.int8_linear, "torch": eager.int8_linear, "c": c.int8_linear, "triton": _triton}
)


def int8_linear(
    counts: Tensor,
    weight: Tensor,
    scales: Tensor,
    group: int | None = None,
    *,
    threshold: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y[o] = threshold * z + bias[o], z = sum_j scales[o, j] * (sum over i of counts[i] * weight[o, i]).

    The inner sum runs over the inputs i of group j.

    The integer sums are exact and the groups are added in order, so that a row of counts gives the same bits
    alone and in any batch, in every form, with any number of threads, on any device.

    Args:
        counts: [.., D], whole numbers from -127 to 127, of an integer or floating dtype. Larger ones are
            refused on CPUs; CUDA devices cap them, because a look at the values would stop the queue.
        weight: int8 [O, D], from -127 to 127. On GPUs a product of up to four tokens with :func:`in_out`
            weights reads only the inputs that fired in one of them.
        scales: float32 (or float64) [O, ceil(D / group)].
        group: inputs that share a scale, the last group may be shorter; None for one scale per output.
        threshold: [.., 1], what a count stands for; None for 1.
        bias: [O], added last; None for 0.

    Returns:
        y [.., O] in the dtype of ``scales``, also under autocast. Threshold and bias give the bits of
        ``(y * threshold).to(y.dtype) + bias.to(y.dtype)``, in Triton in the same pass. Gradients reach
        ``counts`` (those of the product with the dequantised weights) and ``threshold``, not the weights.

    Raises:
        ShapeError: shapes or dtypes that do not fit, or a count beyond 127.
        KernelError: a back-end that was asked for and is not available, or Triton with float64 scales.
    """
    width = weight.shape[-1]
    size = width if group is None else group
    _check(counts, weight, scales, size, threshold, bias)
    name = choose("int8_linear", counts.device, dtype=counts.dtype)
    if name == "triton" and scales.dtype != torch.float32:
        if backend() == "triton":
            raise KernelError(
                f"the Triton form of int8_linear has no {scales.dtype} scales; use auto or torch"
            )
        name = "torch"
    if name != "c":
        _check_range(counts)  # the C form sees it on its way
    if name == "triton" and not _wants_gradient(counts, threshold, bias):
        return _fused(counts, weight, scales, max(size, 1), threshold, bias)
    y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        counts, weight, scales, max(size, 1), _FORMS[name]
    )
    if threshold is not None:
        y = (y * threshold).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def in_out(weight: Tensor) -> Tensor:
    """The same weights [O, D], in memory [D, O]: a row for each input."""
    return weight.t().contiguous().t()


@torch.no_grad()
def integer_sums(counts: Tensor, weight: Tensor, group: int | None = None) -> Tensor:
    """The exact inner sums of :func:`int8_linear`, int32 [groups, .., O]; arguments as there.

    For what must be added before scaling: micro-steps of a spike coding, parts of the inputs on ranks.
    """
    width = weight.shape[1]
    size = max(width if group is None else group, 1)
    rows = counts.reshape(-1, width)
    if choose("int8_linear", counts.device) == "c":
        sums: Tensor = c.int8_sums(rows, weight, size)
    else:
        with _plain(counts.device):
            sums = eager.integer_sums(rows, weight, size)
    return sums.reshape(sums.shape[0], *counts.shape[:-1], weight.shape[0])


@torch.no_grad()
def scaled_sums(sums: Tensor, scales: Tensor) -> Tensor:
    """What :func:`int8_linear` makes of its inner sums, with the same bits.

    Args:
        sums: int32 [groups, .., O].
        scales: float32 or float64 [O, groups].

    Returns:
        y [.., O] in the dtype of ``scales``.
    """
    y = torch.zeros(sums.shape[1:], dtype=scales.dtype, device=sums.device)
    for j in range(sums.shape[0]):
        y += sums[j].to(scales.dtype) * scales[:, j]
    return y


def dequantised(weight: Tensor, scales: Tensor, group: int | None = None) -> Tensor:
    """The matrix [O, D] that int8 weights and their scales stand for, in the dtype of ``scales``."""
    width = weight.shape[1]
    size = width if group is None else group
    return weight.to(scales.dtype) * scales.repeat_interleave(max(size, 1), 1)[:, :width]


class _Product(torch.autograd.Function):
    """The product without what autograd would keep of it, and outside autocast, which would round it."""

    @staticmethod
    def forward(ctx: Any, counts: Tensor, weight: Tensor, scales: Tensor, group: int, form: _Form) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.group, ctx.dtype = group, counts.dtype
        rows = counts.reshape(-1, counts.shape[-1])
        with _plain(counts.device):
            y = form(rows, weight, scales, group)
        return y.reshape(*counts.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, scales = ctx.saved_tensors
        with _plain(grads[0].device):
            gradient = grads[0].to(scales.dtype) @ dequantised(weight, scales, ctx.group)
        return gradient.to(ctx.dtype), None, None, None, None


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _fused(
    counts: Tensor, weight: Tensor, scales: Tensor, group: int, threshold: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The Triton form with threshold and bias; a threshold that is not float32 is multiplied outside."""
    from spikelm.kernels.int8_linear import triton

    rows = counts.reshape(-1, counts.shape[-1])
    inside = threshold is None or threshold.dtype == torch.float32
    factor = threshold.reshape(-1) if threshold is not None and inside else None
    y: Tensor = triton.product(rows, weight, scales.detach(), group, factor, bias if inside else None)
    y = y.reshape(*counts.shape[:-1], weight.shape[0])
    if threshold is not None and not inside:
        y = (y * threshold).to(y.dtype)
        y = y if bias is None else y + bias.to(y.dtype)
    return y


def _plain(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast, which would round what is exact."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _check(
    counts: Tensor,
    weight: Tensor,
    scales: Tensor,
    size: int,
    threshold: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Everything but values. A shape or device is asked for once: that is what costs here."""
    matrix, rows, device = weight.shape, counts.shape, counts.device
    if weight.dtype != torch.int8 or len(matrix) != 2:
        raise ShapeError(f"int8_linear needs int8 weights [O, D], got {weight.dtype} {list(weight.shape)}")
    outputs, width = matrix
    if scales.device != device:
        raise ShapeError(f"int8_linear needs scales on {counts.device}, got them on {scales.device}")
    kind = counts.dtype
    if not rows or rows[-1] != width or kind in _UNSIGNED or (kind != torch.int8 and counts.is_complex()):
        raise ShapeError(
            f"int8_linear needs counts [.., {width}] of a signed dtype, "
            f"got {counts.dtype} {list(counts.shape)}"
        )
    if not (isinstance(size, int) and (size >= 1 or width == 0)) or min(size, width) > LONGEST:
        raise ShapeError(f"the group size is {size}; expected from 1 to {LONGEST}, whose sums fit int32")
    groups = -(-width // max(size, 1))
    if scales.shape != (outputs, groups) or scales.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"int8_linear needs scales [{outputs}, {groups}] of float32 or float64, "
            f"got {scales.dtype} {list(scales.shape)}"
        )
    for name, other in (("weight", weight), ("threshold", threshold), ("bias", bias)):
        if other is not None and other.device != device:
            raise ShapeError(f"int8_linear needs {name} on {device}, got it on {other.device}")
    if threshold is not None and threshold.shape != (*rows[:-1], 1):
        raise ShapeError(f"threshold is {list(threshold.shape)}; expected {[*rows[:-1], 1]}")
    if bias is not None and bias.shape != (outputs,):
        raise ShapeError(f"bias is {list(bias.shape)}; expected {[outputs]}")


def _check_range(counts: Tensor) -> None:
    if counts.device.type == "cpu" and counts.numel() and bool((counts.abs() > eager.LARGEST).any()):
        raise ShapeError(c.too_large(counts))
