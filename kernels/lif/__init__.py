"""Leaky integrate-and-fire over a sequence: one membrane per channel, one step per token.

Forms: reference.py (the equations), scan.py (plain torch), c.py and op.c (CPUs), triton*.py (GPUs); decode.py
is the step of rows that keep their membranes in a pool. Equations and masks are written in reference.py.
Source: Fang et al. 2021, https://arxiv.org/abs/2007.05785, equations 2-4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.gates import looks, refuse_not_finite, refuse_number
from spikelm.kernels.lif import autograd, reference, scan
from spikelm.kernels.lif.decode import lif_decode
from spikelm.kernels.lif.neuron import Neuron
from spikelm.kernels.lif.surrogates import Derivative, derivative
from spikelm.kernels.masks import check_companions, check_masks

__all__ = ["lif", "lif_decode"]

_Form = Callable[[Tensor, Tensor, Tensor, Neuron, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def _triton(
    x: Tensor, v0: Tensor, rate: Tensor, neuron: Neuron, reset: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    from spikelm.kernels.lif import triton

    found: tuple[Tensor, Tensor] = triton.lif(x, v0, rate, neuron, reset, valid)
    return found


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {"reference": reference.lif, "torch": scan.lif, "c": autograd.lif, "triton": _triton}
)


def lif(
    x: Tensor,
    v0: Tensor,
    rate: Tensor,
    *,
    threshold: float = 1.0,
    v_reset: float = 0.0,
    soft_reset: bool = False,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str | Derivative = "atan",
    alpha: float = 2.0,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Spikes of leaky integrate-and-fire neurons over T tokens, from a membrane to a membrane.

    Per token: charge h = v + (x - (v - v_reset)) rate (``decay_input``) or v - (v - v_reset) rate + x; fire
    s = h >= threshold; reset to v_reset (hard) or by subtraction of the threshold (soft).

    Args:
        x: input current [B, T, C], any floating dtype.
        v0: membrane before the first token [B, C]. At rest: ``v_reset`` (hard reset) or 0 (soft).
        rate: leak rate per channel [C], 1/tau; 0 gives integrate-and-fire (with ``decay_input=False``).
        threshold: membrane at which a spike is fired.
        v_reset: resting membrane.
        soft_reset: subtract the threshold after a spike instead of returning to rest.
        decay_input: scale the input by the rate too.
        detach_reset: no gradient through the spike inside the reset.
        surrogate: atan, sigmoid, triangle or straight_through, or a function (u, alpha) -> derivative, which
            runs on the torch back-ends only.
        alpha: sharpness of the surrogate.
        reset: bool [B, T]; where true the membrane is put to rest before the token.
        valid: bool [B, T]; where false the membrane stays (after a reset, if any) and the spike is 0.

    Returns:
        spikes [B, T, C] of 0 and 1 in x's dtype, and the last membrane [B, C] in float32 (float64 where x is
        float64). Gradients reach x, v0 and rate, from both results.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, a rate that is NaN or infinite. Not seen on GPUs, where a look at the values would
            stop the queue.
        KernelError: a threshold, v_reset or alpha that is NaN or infinite, an unknown surrogate, or a
            back-end that was asked for and is not available.
    """
    _check(x, v0, rate, reset, valid)
    refuse_number("lif", threshold=threshold, v_reset=v_reset, alpha=alpha)
    neuron = Neuron(
        threshold=threshold,
        v_reset=v_reset,
        soft_reset=soft_reset,
        decay_input=decay_input,
        detach_reset=detach_reset,
        surrogate=surrogate,
        alpha=alpha,
    )
    derivative(surrogate)  # an unknown name is refused here, whatever the back-end
    if callable(surrogate) and backend() == AUTO:
        form = "torch"
    else:
        form = choose("lif", x.device, kernel="sequence", dtype=x.dtype, surrogate=surrogate)
    if form == "triton" and x.dtype == torch.float64 and backend() == AUTO:
        form = "torch"  # GPU kernels compute in float32
    if form == "triton":
        return _triton(x, v0, rate, neuron, reset, valid)
    if form != "c" and looks(rate):  # the C form sees it on its way
        refuse_not_finite("lif", "rate", rate)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    spikes, last = _FORMS[form](x.to(dtype), v0.to(dtype), rate.to(dtype), neuron, reset, valid)
    return spikes.to(x.dtype), last


def _check(
    x: Tensor, v0: Tensor, rate: Tensor, reset: Tensor | None = None, valid: Tensor | None = None
) -> None:
    """Everything but values."""
    sizes = x.shape
    if len(sizes) != 3 or not x.is_floating_point():
        raise ShapeError(f"lif needs floating x [B, T, C], got {x.dtype} {list(x.shape)}")
    batch, _, channels = sizes
    if v0.shape != (batch, channels):
        raise ShapeError(
            f"lif needs v0 [B, C] = {[batch, channels]} for x {list(x.shape)}, got {list(v0.shape)}"
        )
    if rate.shape != (channels,):
        raise ShapeError(f"lif needs rate [C] = {[channels]} for x {list(x.shape)}, got {list(rate.shape)}")
    check_companions("lif", x, v0=v0, rate=rate)
    check_masks(x, reset, valid)
