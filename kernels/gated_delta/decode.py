"""One token of the gated delta rule per row, on states that stay in a pool and change in place."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.gated_delta import reference
from spikelm.kernels.gates import looks, refuse_decay, refuse_not_finite
from spikelm.kernels.slots import check_slots


def gated_delta_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    pool: Tensor,
    slots: Tensor,
    *,
    scale: float,
) -> Tensor:
    """One token of the gated delta rule for each row, on the row's state in a pool.

    Row b: S = exp(g) S, S = S + beta k^T (v - k S), o = scale * q S with S = pool[slots[b]], which changes in
    place. Not differentiable. Two rows must not name one slot.

    Args:
        q: queries [B, H, K], any floating dtype; H is a multiple of G.
        k: keys [B, G, K], normalised by the caller.
        v: values [B, G, V].
        g: log decays [B, G], <= 0, -inf included.
        beta: write strengths [B, G].
        pool: states [S, G, K, V], contiguous float32 (float64 with float64 q).
        slots: int32 or int64 [B]; a negative one is a row that does nothing, its output is 0.
        scale: factor of the output.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, of a row with a slot, a decay that is NaN or above zero or a strength that is not
            finite; no state has changed then.
        KernelError: a back-end that was asked for and is not available.
    """
    _check(q, k, v, g, beta)
    check_slots("gated_delta_decode", q, pool, slots, (*k.shape[1:], v.shape[2]))
    dtype = str(q.dtype).removeprefix("torch.")
    name = choose("gated_delta", q.device, kernel="decode", dtype=dtype, K=q.shape[2])
    if name == "triton":
        wide = torch.float64 in {x.dtype for x in (q, k, v, pool)}
        if not wide:
            from spikelm.kernels.gated_delta import triton_decode

            out: Tensor = triton_decode.gated_delta_decode(q, k, v, g, beta, pool, slots, scale)
            return out
        if backend() != AUTO:
            raise KernelError(
                "gated_delta_decode in Triton computes in float32 and an input is float64; use auto or torch"
            )
    out = step_in_pool(q, k, v, g, beta, pool, slots, scale)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ShapeError(f"gated_delta_decode needs floating q [B, H, K], got {q.dtype} {list(q.shape)}")
    batch, heads, width = q.shape
    if k.dim() != 3 or k.shape[0] != batch or k.shape[2] != width or k.shape[1] == 0 or heads % k.shape[1]:
        raise ShapeError(
            f"gated_delta_decode needs k [{batch}, a divisor of {heads}, {width}] for q {list(q.shape)}, "
            f"got {list(k.shape)}"
        )
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise ShapeError(f"gated_delta_decode needs v [{batch}, {k.shape[1]}, V], got {list(v.shape)}")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != k.shape[:2]:
            raise ShapeError(f"gated_delta_decode needs {name} {list(k.shape[:2])}, got {list(x.shape)}")


@torch.library.custom_op("spikelm::gated_delta_decode", mutates_args=("pool",))
def step_in_pool(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Plain torch form of the op, any device: o [B, H, V] in v's dtype; shapes as in the op."""
    with torch.autocast(q.device.type, enabled=False):
        busy = (slots >= 0).nonzero()[:, 0]
        own = slots[busy].long()
        queries = q[busy].to(pool.dtype).unflatten(1, (k.shape[1], -1))
        keys, values, gates, betas = (x[busy].to(pool.dtype) for x in (k, v, g, beta))
        if looks(gates, betas):  # before any state changes
            refuse_decay("gated_delta_decode", "g of the busy rows", gates)
            refuse_not_finite("gated_delta_decode", "beta of the busy rows", betas)
        o, state = reference.step(queries, keys, values, gates, betas, pool[own], scale)
        pool[own] = state
        out = v.new_zeros(*q.shape[:2], v.shape[2])
        out[busy] = o.flatten(1, 2).to(v.dtype)
    return out


@step_in_pool.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])
