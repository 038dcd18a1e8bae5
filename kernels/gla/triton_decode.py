"""One token of gated linear attention per row in Triton: the state is read once, changed and written back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.gla.triton_common import LOG2E
from spikelm.kernels.gla.triton_tiles import decode_tiles, gate_kind
from spikelm.kernels.triton_launch import Device, common_dtype, compact, device_of, on_device, refused


@triton.jit
def decode(
    q,
    k,
    v,
    g,
    pool,
    slots,
    o,
    scale,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
):
    """o [B, G N, V]; pool [S, G, K, V] changes at ``slots`` [B]. Grid: (blocks of V, B G)."""
    pair = tl.program_id(1).to(tl.int64)
    row, group = pair // G, pair % G
    c = tl.arange(0, BK)
    a = tl.program_id(0) * BV + tl.arange(0, BV)
    inside, wanted = c < K, a < V
    o += pair * N * V
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        place = pool + (slot * G + group) * K * V + c[:, None] * V + a[None, :]
        mask = inside[:, None] & wanted[None, :]
        state = tl.load(place, mask=mask, other=0.0)
        keys = tl.load(k + pair * K + c, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(v + pair * V + a, mask=wanted, other=0.0).to(tl.float32)
        if GATE == 2:
            gates = tl.load(g + pair * K + c, mask=inside, other=0.0).to(tl.float32)
            state *= tl.exp2(gates * LOG2E)[:, None]
        if GATE == 1:
            state *= tl.exp2(tl.load(g + pair).to(tl.float32) * LOG2E)
        state += keys[:, None] * values[None, :]
        tl.store(place, state, mask=mask)
        for head in range(N):
            queries = tl.load(q + (pair * N + head) * K + c, mask=inside, other=0.0).to(tl.float32)
            out = tl.sum(queries[:, None] * state, axis=0) * scale
            tl.store(o + head * V + a, out.to(o.dtype.element_ty), mask=wanted)
    else:
        for head in range(N):
            tl.store(o + head * V + a, tl.zeros([BV], dtype=tl.float32).to(o.dtype.element_ty), mask=wanted)


def check(q: Tensor, k: Tensor, v: Tensor, pool: Tensor) -> str | None:
    """Why these inputs are not for the Triton kernel, or None."""
    return refused("decode steps of gla in Triton", k, q, v, pool)


@torch.library.custom_op("spikelm::gla_decode_triton", mutates_args=("pool",))
def gla_decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """o [B, H, V] in v's dtype; shapes as in the op."""
    return launch_decode(device_of(q.device), q, k, v, g, pool, slots, scale)


def launch_decode(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    scale: float,
) -> Tensor:
    """The kernel on a device, or on paper; inputs of one dtype and gates in float32, as it is listed."""
    dtype, kind = common_dtype(q, k, v), v.dtype
    q, k, v = (compact(x.to(dtype)) for x in (q, k, v))
    g = None if g is None else compact(g.float())
    batch, groups, key_dim = k.shape
    value_dim = v.shape[2]
    o = v.new_empty(batch, q.shape[1], value_dim)
    if o.numel() == 0:
        return o.to(kind)
    block, columns, warps = decode_tiles(key_dim)
    constants = {
        "G": groups,
        "K": key_dim,
        "V": value_dim,
        "N": q.shape[1] // groups,
        "BK": block,
        "BV": columns,
        "GATE": gate_kind(g, key_dim),
    }
    with on_device(q):
        grid = (-(-value_dim // columns), batch * groups)
        device.launch(decode, grid, (q, k, v, g, pool, compact(slots), o, scale), constants, warps, 1)
    return o.to(kind)


@gla_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])
