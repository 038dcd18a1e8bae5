"""One token of the wkv recurrence for rows that keep their states in a pool of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import choose
from spikelm.kernels.gates import looks
from spikelm.kernels.slots import check_slots
from spikelm.kernels.wkv4 import reference


def wkv4_decode(w: Tensor, u: Tensor, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
    """wkv of one token; the states in the pool are updated in place. No gradient.

    Args:
        w: log of the decay rate [C]; a step multiplies by exp(-exp(w)).
        u: bonus of the current token [C].
        k: keys [B, C], any floating dtype.
        v: values [B, C].
        pool: states (num, den, max) [S, 3, C], float32 and contiguous; see
            :func:`spikelm.kernels.wkv4.initial_state`.
        slots: int32 or int64 [B], each row's place in the pool, below S and different from the others'. A
            negative slot is a row that does nothing: its y is 0 and no state changes.

    Returns:
        y [B, C] in v's dtype.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, a w that is NaN or a u that is not finite; no state has changed then.
        KernelError: a back-end that was asked for and is not available.
    """
    if k.dim() != 2 or not k.is_floating_point() or v.shape != k.shape:
        raise ShapeError(
            f"wkv4_decode needs floating k and v [B, C], got {k.dtype} {list(k.shape)} and {list(v.shape)}"
        )
    check_slots("wkv4_decode", k, pool, slots, (3, k.shape[1]))
    for name, x in (("w", w), ("u", u)):
        if x.shape != k.shape[1:]:
            raise ShapeError(f"wkv4_decode needs {name} [C] = {[k.shape[1]]}, got {list(x.shape)}")
    y: Tensor = _wkv4_decode(-torch.exp(w.to(pool.dtype)), u.to(pool.dtype), k, v, pool, slots)
    return y


@torch.library.custom_op("spikelm::wkv4_decode", mutates_args=("pool",))
def _wkv4_decode(decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
    name = choose("wkv4", k.device, kernel="decode", dtype=k.dtype)
    if name == "triton" and pool.dtype != torch.float64:
        from spikelm.kernels.wkv4 import triton

        found: Tensor = triton.wkv4_decode(decay, bonus, k, v, pool, slots)
        return found
    if looks(decay, bonus):  # before any state changes
        reference.refuse_gates("wkv4_decode", decay, bonus)
    used = slots >= 0
    places = slots[used].long()
    y = torch.zeros_like(v)
    key, value = k[used].to(pool.dtype), v[used].to(pool.dtype)
    out, pool[places] = reference.step(decay, bonus, key, value, pool[places])
    y[used] = out.to(v.dtype)
    return y


@_wkv4_decode.register_fake
def _(decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(v)
