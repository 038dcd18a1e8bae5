"""Floating activations with many zeros times weights stored [in, out]: rows of silent channels are not read.

The product of decoding, where reading the weights is the whole cost: up to four tokens whose inputs are
spikes (or were set to zero below a magnitude). Forms: reference.py (the equation), plain torch, triton.py
(GPUs). Integer weights have their own op, ``int8_linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import backend, choose
from spikelm.kernels.event_linear import reference

__all__ = ["BATCH", "event_linear", "spmv"]

BATCH = 4
"""Tokens up to which rows are skipped; the channels that fire in more are nearly all of them."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the Triton form."""

_Form = Callable[[Tensor, Tensor], Tensor]


def event_linear(x: Tensor, wt: Tensor) -> Tensor:
    """y = x wt, of which only the rows of ``wt`` are read whose channel is not zero in every token.

    Sums are float32 (float64 for float64) and added in a fixed order: the same call gives the same bits. A
    NaN or infinity in a silent row of ``wt`` is not seen in the reference and in Triton.

    Args:
        x: [.., D]; more than BATCH tokens, and calls that need a gradient, are one dense product.
        wt: [D, O], the transposed weight of a linear layer, in x's dtype.

    Returns:
        y [.., O] in x's dtype.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        KernelError: a back-end that was asked for and is not available, or Triton with another dtype.
    """
    _check(x, wt)
    name = choose("event_linear", x.device, dtype=str(x.dtype).removeprefix("torch."))
    if name == "triton" and x.dtype not in DTYPES:
        if backend() == "triton":
            raise KernelError(f"the Triton form of event_linear has no {x.dtype}; use auto or torch")
        name = "torch"
    rows = x.reshape(-1, x.shape[-1])
    wants = torch.is_grad_enabled() and (x.requires_grad or wt.requires_grad)
    y = rows @ wt if wants or rows.shape[0] > BATCH else _FORMS[name](rows, wt)
    return y.reshape(*x.shape[:-1], wt.shape[1])


def _check(x: Tensor, wt: Tensor) -> None:
    if wt.dim() != 2 or x.dim() == 0 or x.shape[-1] != wt.shape[0]:
        raise ShapeError(
            f"event_linear needs x [.., D] and wt [D, O], got {list(x.shape)} and {list(wt.shape)}"
        )
    if x.dtype != wt.dtype or not x.is_floating_point():
        raise ShapeError(f"event_linear needs x and wt of one floating dtype, got {x.dtype} and {wt.dtype}")
    if x.device != wt.device:
        raise ShapeError(f"event_linear needs wt on {x.device} like x, got it on {wt.device}")


def spmv(x: Tensor, wt: Tensor) -> Tensor:
    """:func:`event_linear` under the name that sparse matrix-vector products usually have."""
    return event_linear(x, wt)


def _triton(x: Tensor, wt: Tensor) -> Tensor:
    from spikelm.kernels.event_linear import triton

    y: Tensor = triton.product(x, wt)
    return y


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {"reference": reference.event_linear, "torch": torch.matmul, "triton": _triton}
)
