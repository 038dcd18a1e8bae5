"""The wkv recurrence of RWKV-4: an exponentially decayed, key-weighted mean of values per channel.

Forms: reference.py (the equations), chunked.py (plain torch), c.py and op.c (CPUs), triton*.py (GPUs);
decode.py is the step of rows that keep their states in a pool. Equations, masks and the scaled state are
written in reference.py. Source: Peng et al. 2023 (RWKV), https://arxiv.org/abs/2305.13048; used by SpikeGPT,
https://arxiv.org/abs/2302.13939.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.gates import looks
from spikelm.kernels.masks import check_companions, check_masks
from spikelm.kernels.wkv4 import autograd, chunked, reference
from spikelm.kernels.wkv4.decode import wkv4_decode
from spikelm.kernels.wkv4.reference import initial_state

__all__ = ["initial_state", "wkv4", "wkv4_decode"]

_Form = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]
]


def _triton(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from spikelm.kernels.wkv4 import triton

    found: tuple[Tensor, Tensor] = triton.wkv4(decay, bonus, k, v, state, reset, valid)
    return found


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {"reference": reference.wkv4, "torch": chunked.wkv4, "c": autograd.wkv4, "triton": _triton}
)


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-4's wkv over T tokens, from a state to a state.

    Token t: y_t = (A + exp(u + k_t) v_t) / (B + exp(u + k_t)); then A <- exp(-exp(w)) A + exp(k_t) v_t and
    B <- exp(-exp(w)) B + exp(k_t). The result does not depend on where a sequence is split.

    Args:
        w: log of the decay rate [C]; a step multiplies by exp(-exp(w)).
        u: bonus of the current token [C].
        k: keys [B, T, C], any floating dtype; safe for any finite value.
        v: values [B, T, C].
        state: (num, den, max) [B, 3, C], A = num exp(max), B = den exp(max), den not negative; see
            :func:`initial_state`.
        reset: bool [B, T]; where true the state is emptied before the token.
        valid: bool [B, T]; where false the state stays (after a reset, if any) and y is 0.

    Returns:
        y [B, T, C] in v's dtype, and the state [B, 3, C] in float32 (float64 where k or v is float64).
        Gradients reach w, u, k, v and the incoming num and den, from y and the returned num and den; max is a
        scale and has none.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, a w that is NaN or a u that is not finite. Not seen on GPUs, where a look at the
            values would stop the queue.
        KernelError: a back-end that was asked for and is not available.
    """
    _check(w, u, k, v, state, reset, valid)
    name = choose("wkv4", k.device, kernel="sequence", dtype=k.dtype)
    dtype = torch.float64 if torch.float64 in (k.dtype, v.dtype) else torch.float32
    decay = -torch.exp(w.to(dtype))
    if name == "triton" and dtype == torch.float64 and backend() == AUTO:
        name = "torch"  # GPU kernels compute in float32
    if name == "triton":
        return _triton(decay, u, k, v, state, reset, valid)
    if name != "c" and looks(decay, u):  # the C form sees it on its way
        reference.refuse_gates("wkv4", decay, u)
    y, last = _FORMS[name](decay, u.to(dtype), k.to(dtype), v.to(dtype), state.to(dtype), reset, valid)
    return y.to(v.dtype), last


def _check(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:
    """Everything but values."""
    sizes = k.shape
    if len(sizes) != 3 or not k.is_floating_point():
        raise ShapeError(f"wkv4 needs floating k [B, T, C], got {k.dtype} {list(k.shape)}")
    batch, _, channels = sizes
    if v.shape != sizes:
        raise ShapeError(f"wkv4 needs v of k's shape {list(k.shape)}, got {list(v.shape)}")
    for name, x, shape in (
        ("w", w, (channels,)),
        ("u", u, (channels,)),
        ("state", state, (batch, 3, channels)),
    ):
        if x.shape != shape:
            raise ShapeError(f"wkv4 needs {name} {list(shape)} for k {list(k.shape)}, got {list(x.shape)}")
    check_companions("wkv4", k, w=w, u=u, v=v, state=state)
    check_masks(k, reset, valid)
