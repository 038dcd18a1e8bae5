"""One token of gated linear attention per row, on states that stay in a pool and change in place."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.gates import looks, refuse_decay
from spikelm.kernels.gla import reference
from spikelm.kernels.slots import check_slots


def gla_decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, *, scale: float
) -> Tensor:
    """One token of gated linear attention for each row, on the row's state in a pool.

    Row b: S = diag(exp g) S + k^T v and o = scale * q S with S = pool[slots[b]], which changes in place. Not
    differentiable. Two rows must not name one slot.

    Args:
        q: queries [B, H, K], any floating dtype; H is a multiple of G.
        k: keys [B, G, K].
        v: values [B, G, V].
        g: log gates <= 0, -inf included: [B, G, K], [B, G, 1], or None for no decay.
        pool: states [S, G, K, V], contiguous float32 (float64 with float64 q).
        slots: int32 or int64 [B]; a negative one is a row that does nothing, its output is 0.
        scale: factor of the output.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, a gate of a row with a slot that is NaN or above zero; no state has changed then.
        KernelError: a back-end that was asked for and is not available.
    """
    _check(q, k, v, g)
    check_slots("gla_decode", q, pool, slots, (*k.shape[1:], v.shape[2]))
    name = choose("gla", q.device, kernel="decode", dtype=str(q.dtype).removeprefix("torch."), K=q.shape[2])
    if name == "triton":
        wide = torch.float64 in {x.dtype for x in (q, k, v, pool)}
        if not wide:
            from spikelm.kernels.gla import triton_decode

            out: Tensor = triton_decode.gla_decode(q, k, v, g, pool, slots, scale)
            return out
        if backend() != AUTO:
            raise KernelError(
                "gla_decode in Triton computes in float32 and an input is float64; use auto or torch"
            )
    out = step_in_pool(q, k, v, g, pool, slots, scale)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ShapeError(f"gla_decode needs floating q [B, H, K], got {q.dtype} {list(q.shape)}")
    batch, heads, width = q.shape
    if k.dim() != 3 or k.shape[0] != batch or k.shape[2] != width or k.shape[1] == 0 or heads % k.shape[1]:
        raise ShapeError(
            f"gla_decode needs k [{batch}, a divisor of {heads}, {width}] for q {list(q.shape)}, "
            f"got {list(k.shape)}"
        )
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise ShapeError(f"gla_decode needs v [{batch}, {k.shape[1]}, V], got {list(v.shape)}")
    if g is not None and (g.dim() != 3 or g.shape[:2] != k.shape[:2] or g.shape[2] not in (1, width)):
        raise ShapeError(
            f"gla_decode needs g [{batch}, {k.shape[1]}, {width}] (or a last dimension of 1), "
            f"got {list(g.shape)}"
        )


@torch.library.custom_op("spikelm::gla_decode", mutates_args=("pool",))
def step_in_pool(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Plain torch form of the op, any device: o [B, H, V] in v's dtype; shapes as in the op."""
    with torch.autocast(q.device.type, enabled=False):
        busy = (slots >= 0).nonzero()[:, 0]
        own = slots[busy].long()
        queries, keys, values = (x[busy].to(pool.dtype) for x in (q, k, v))
        gates = None if g is None else g[busy].to(pool.dtype)
        if gates is not None and looks(gates):  # before any state changes
            refuse_decay("gla_decode", "g of the busy rows", gates)
        o, state = reference.step(queries, keys, values, gates, pool[own], scale)
        pool[own] = state
        out = v.new_zeros(*q.shape[:2], v.shape[2])
        out[busy] = o.to(v.dtype)
    return out


@step_in_pool.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])
