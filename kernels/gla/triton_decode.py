"""One token of gated linear attention per row in Triton: the state is read once, changed and written back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.gla.triton_common import LOG2E


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


def decode_tiles(key_dim: int) -> tuple[int, int, int]:
    """Channels of K, columns of V, and warps of a program, which holds 16 KB of state."""
    block = max(16, 1 << (key_dim - 1).bit_length())
    return block, max(16, 4096 // block), 4


@torch.library.custom_op("spikelm::gla_decode_triton", mutates_args=("pool",))
def gla_decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """o [B, H, V] in v's dtype; shapes as in the op."""
    from spikelm.kernels.gla.triton import gate_kind, on_device

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g = None if g is None else g.contiguous()
    batch, groups, key_dim = k.shape
    value_dim = v.shape[2]
    o = v.new_empty(batch, q.shape[1], value_dim)
    if o.numel() == 0:
        return o
    block, columns, warps = decode_tiles(key_dim)
    with on_device(q):
        decode[(-(-value_dim // columns), batch * groups)](
            q,
            k,
            v,
            g,
            pool,
            slots.contiguous(),
            o,
            scale,
            G=groups,
            K=key_dim,
            V=value_dim,
            N=q.shape[1] // groups,
            BK=block,
            BV=columns,
            GATE=gate_kind(g, key_dim),
            num_warps=warps,
        )
    return o


@gla_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, slots: Tensor, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2])
