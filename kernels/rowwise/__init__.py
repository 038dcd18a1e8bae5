"""Elementwise functions and norms whose bits depend on the element (or its row) alone, for inference.

torch computes the last elements of a tensor, or of a thread's share of it, in another way than the rest, and
nobody else computes its exponentials and row sums. The C form (step.h) is shared with decode plans, so that a
model gives the same bits there. There is no gradient: callers use torch's own forms where one is asked for.

Forms: reference.py (the equations), eager.py (plain torch), c.py and op.c (CPUs, float32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError, nearest
from spikelm.kernels.dispatch import backend, choose
from spikelm.kernels.rowwise import c, eager, reference
from spikelm.kernels.rowwise.c import FUNCTIONS

__all__ = ["FUNCTIONS", "lerp", "norm", "softmax", "unary"]


def unary(x: Tensor, function: str) -> Tensor:
    """exp, sigmoid, silu, logsigmoid or softplus of every element of x [..], in x's dtype.

    bfloat16 and float16 are computed in float32, float64 in torch.

    Raises:
        ShapeError: x is not floating.
        KernelError: another function, or a back-end that was asked for and is not available.
    """
    _check("unary", x)
    if function not in FUNCTIONS:
        raise KernelError(nearest("elementwise function", function, FUNCTIONS))
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    form = _form(wide)
    y: Tensor
    if form == "c":
        y = c.unary(wide, FUNCTIONS.index(function))
    else:
        y = (reference if form == "reference" else eager).unary(wide, function)
    return y.to(x.dtype)


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """start + weight (end - start), from the nearer end.

    Args:
        start: floating [.., D].
        end: of the same shape and dtype.
        weight: [D], of the same dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        KernelError: a back-end that was asked for and is not available.
    """
    _check("lerp", start, weight=weight)
    if end.shape != start.shape or end.dtype != start.dtype or end.device != start.device:
        raise ShapeError(
            f"lerp needs an end like the start, {start.dtype} {list(start.shape)} on {start.device}, "
            f"got {end.dtype} {list(end.shape)} on {end.device}"
        )
    y: Tensor = (c.lerp if _form(start) == "c" else torch.lerp)(start, end, weight)
    return y


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension of floating x [.., D], in its dtype.

    Raises:
        ShapeError: x is a scalar or not floating.
        KernelError: a back-end that was asked for and is not available.
    """
    _check("softmax", x)
    if x.dim() == 0:
        raise ShapeError("softmax needs x [.., D], got a scalar")
    if x.shape[-1] and _form(x) == "c":
        y: Tensor = c.softmax(x)
        return y
    return torch.softmax(x, -1)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, kind: str) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension of x [.., D].

    Args:
        x: floating.
        weight: [D] or None for ones.
        bias: [D] or None for zeros; LayerNorm only.
        epsilon: added to the variance, or to the mean square.
        kind: ``layernorm`` or ``rmsnorm``.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        KernelError: another kind, or a back-end that was asked for and is not available.
    """
    if kind not in ("layernorm", "rmsnorm"):
        raise KernelError(nearest("norm", kind, ("layernorm", "rmsnorm")))
    _check("norm", x, weight=weight, bias=bias)
    form = _form(x)
    y: Tensor
    if form == "c":
        y = c.norm(x, weight, bias, epsilon, kind == "layernorm")
    else:
        y = (reference if form == "reference" else eager).norm(x, weight, bias, epsilon, kind)
    return y


def _check(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """x floating; the vectors [D] for x [.., D], of its dtype or float32 (autocast) and on its device."""
    if not x.is_floating_point():
        raise ShapeError(f"{op} needs floating x, got {x.dtype}")
    for name, vector in vectors.items():
        if vector is not None and (
            x.dim() == 0
            or vector.shape != x.shape[-1:]
            or vector.dtype not in (x.dtype, torch.float32)
            or vector.device != x.device
        ):
            raise ShapeError(
                f"{op} needs {name} [D] of {x.dtype} on {x.device} for x [.., D] = {list(x.shape)}, "
                f"got {vector.dtype} {list(vector.shape)} on {vector.device}"
            )


def _form(x: Tensor) -> str:
    """C is for float32 on CPUs; elsewhere the form is torch's, also where Triton was asked for."""
    if backend() == "reference":
        return "reference"
    if x.dtype != torch.float32 or x.device.type != "cpu" or backend() == "triton":
        return "torch"
    return choose("rowwise", x.device)
