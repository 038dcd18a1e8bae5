"""Gated linear attention: a matrix state per head that decays by data-dependent gates.

Forms: reference.py (the equations), chunked.py (plain torch), c.py and op.c (CPUs). Equations and masks are
written in reference.py. Source: Yang et al. 2023 (GLA), https://arxiv.org/abs/2312.06635; used by
SpikingBrain, https://arxiv.org/abs/2509.05276.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.gates import looks, refuse_decay
from spikelm.kernels.gla import autograd, chunked, reference
from spikelm.kernels.gla.decode import gla_decode
from spikelm.kernels.masks import check_companions, check_masks

__all__ = ["gla", "gla_decode", "initial_state"]

_Form = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor, float, Tensor | None, Tensor | None],
    tuple[Tensor, Tensor],
]


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {"reference": reference.gla, "torch": chunked.gla, "c": autograd.gla}
)


def initial_state(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """State before any token: zeros [B, G, K, V]."""
    return torch.zeros(batch, heads, key_dim, value_dim, device=device, dtype=dtype)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    scale: float,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention over T tokens, from a state to a state.

    Token t: S_t = diag(exp g_t) S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t. Query head h reads key-value
    head h // (H / G); there is one state per key-value head. The result does not depend on where a sequence
    is split.

    Args:
        q: queries [B, T, H, K], any floating dtype; H is a multiple of G.
        k: keys [B, T, G, K].
        v: values [B, T, G, V].
        g: log gates <= 0, -inf (closed) included: per key channel [B, T, G, K], per head [B, T, G, 1], or
            None for no decay.
        state: [B, G, K, V]; see :func:`initial_state`.
        scale: factor of the output, usually K**-0.5.
        reset: bool [B, T]; where true the state is emptied before the token.
        valid: bool [B, T]; where false the state stays (after a reset, if any) and o is 0.

    Returns:
        o [B, T, H, V] in v's dtype, and the state [B, G, K, V] in float32 (float64 where an input is
        float64). Gradients reach q, k, v, g and the incoming state, from both results.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, a gate at a valid token that is NaN or above zero. Not seen on GPUs, where a look
            at the values would stop the queue.
        KernelError: a back-end that was asked for and is not available.
    """
    _check(q, k, v, g, state, reset, valid)
    name = choose(
        "gla",
        q.device,
        kernel="sequence",
        dtype=str(q.dtype).removeprefix("torch."),
        K=q.shape[3],
        V=v.shape[3],
        gate="none" if g is None else "channel" if g.shape[3] == q.shape[3] else "head",
    )
    if name == "triton":
        from spikelm.kernels.gla import triton

        if backend() != AUTO or triton.check(q, k, v, g, state) is None:
            found: tuple[Tensor, Tensor] = triton.gla(q, k, v, g, state, scale, reset, valid)
            return found
        name = "torch"
    if name != "c" and g is not None and looks(g, valid):  # the C form sees it on its way
        refuse_decay("gla", "g", g, valid)
    form = _FORMS[name]
    wide = any(x is not None and x.dtype == torch.float64 for x in (q, k, v, g))
    dtype = torch.float64 if wide else torch.float32
    # Autocast would run the products in 16 bits, and a state is summed over the whole text.
    with _full_precision(q.device.type):
        o, last = form(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            None if g is None else g.to(dtype),
            state.to(dtype),
            scale,
            reset,
            valid,
        )
    return o.to(v.dtype), last


def _full_precision(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:
    """Everything but values. Shapes are asked for once and compared number by number: slices cost most."""
    sizes, keys, values = q.shape, k.shape, v.shape
    if len(sizes) != 4 or not q.is_floating_point():
        raise ShapeError(f"gla needs floating q [B, T, H, K], got {q.dtype} {list(q.shape)}")
    batch, steps, heads, width = sizes
    if len(keys) != 4 or keys[0] != batch or keys[1] != steps or keys[3] != width:
        raise ShapeError(
            f"gla needs k [{batch}, {steps}, G, {width}] for q {list(q.shape)}, got {list(k.shape)}"
        )
    groups = keys[2]
    if groups == 0 or heads % groups:
        raise ShapeError(f"gla got {heads} query heads and {groups} key heads; expected a multiple of them")
    if len(values) != 4 or values[0] != batch or values[1] != steps or values[2] != groups:
        raise ShapeError(f"gla needs v [{batch}, {steps}, {groups}, V], got {list(v.shape)}")
    if g is not None:
        gates = g.shape
        fits = len(gates) == 4 and gates[0] == batch and gates[1] == steps and gates[2] == groups
        if not fits or (gates[3] != 1 and gates[3] != width):
            raise ShapeError(
                f"gla needs g [{batch}, {steps}, {groups}, {width}] (or a last dimension of 1), "
                f"got {list(g.shape)}"
            )
    expected = (batch, groups, width, values[3])
    if state.shape != expected:
        raise ShapeError(f"gla needs a state {list(expected)} for these k and v, got {list(state.shape)}")
    check_companions("gla", q, k=k, v=v, g=g, state=state)
    check_masks(q, reset, valid)
