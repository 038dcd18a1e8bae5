"""Kernels of the gated delta rule that go forward: the triangular systems of the chunks, then the states.

Per chunk (chunked.py has the equations) a token writes k_i^T u_i with (I + N) u = r, where N is strictly
lower triangular, N_ij = beta_i E_ij (k_i k_j^T), E_ij the decay from after token j to token i, and
r_i = beta_i (v_i - E_i k_i S). ``inverse`` finds (I + N)^-1 for all chunks at once, joining the inverses of
neighbouring blocks of 1, 2, 4, ... tokens: with T those of the blocks and M the part of N between them, the
inverse of the pairs is T - T M T. ``forward`` carries the state: u, then the rest as in gated linear
attention with values u.
"""

import triton
import triton.language as tl

from spikelm.kernels.gla.triton_common import (
    factors,
    head_decays,
    head_gates,
    mask_row,
    over_keys,
    pairs,
    store_tile,
    tile,
)


@triton.jit
def strengths(beta, valid, first, left, G: tl.constexpr, C: tl.constexpr, HAS_VALID: tl.constexpr):
    """Write strengths [C] of the tokens from ``first``; 0 at invalid tokens and outside."""
    i = tl.arange(0, C)
    mask = i < left
    if HAS_VALID:
        mask = mask & mask_row(valid + first, left, C)
    return tl.load(beta + first * G + i * G, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def inverse(
    k,
    g,
    beta,
    reset,
    valid,
    solved,
    T,
    G: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """(I + N)^-1 of every chunk, [B G, chunks, C, C]. Grid: (chunks, B G)."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(1).to(tl.int64)
    row, group = pair // G, pair % G
    first = pair * 0 + chunk * C
    left = T - first
    own = row * T * G + group
    i = tl.arange(0, C)
    kept = i < left
    if HAS_RESET:
        reset += row * T
    if HAS_VALID:
        valid += row * T
        kept = mask_row(valid + first, left, C)
    product = tl.zeros([C, C], dtype=tl.float32)
    for column in range(0, K, BK):
        keys = tile(k + (own + first * G) * K, G * K, K, left, column, kept, C, BK, HAS_VALID).to(DOT)
        product = tl.dot(keys, tl.trans(keys), acc=product, input_precision=PRECISION)
    between = head_decays(head_gates(g + own, reset, valid, first, G, left, C, 1, HAS_RESET, HAS_VALID), C)
    strength = strengths(beta + own, valid, first, left, G, C, HAS_VALID)
    weights = product * between * strength[:, None]
    found = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for turn in range(LEVELS):
        across = tl.where(pairs(1 << turn, C), weights, 0.0)
        joined = tl.dot(found, across, input_precision=SOLVE)
        found -= tl.dot(joined, found, input_precision=SOLVE)
    to = solved + (pair * chunks + chunk) * (C * C)
    tl.store(to + i[:, None] * C + i[None, :], found.to(solved.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def forward(
    q,
    k,
    v,
    g,
    beta,
    reset,
    valid,
    start,
    solved,
    o,
    last,
    written,
    states,
    scale,
    T,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    OUTPUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sweep over the chunks. Grid: (blocks of V, B G).

    With OUTPUT o [B, T, G N, V] and the last state [B, G, K, V]; without, for the backward pass, what is
    ``written``, u [B, T, G, V], and the states before each chunk [B G, chunks, K, V].
    """
    column = tl.program_id(0) * BV
    pair = tl.program_id(1).to(tl.int64)
    wide = pair * 0  # int64, so that offsets of long texts do not overflow
    row, group = pair // G, pair % G
    own = row * T * G + group
    chunks = tl.cdiv(T, C)
    k += own * K
    v += own * V
    g += own
    beta += own
    if HAS_RESET:
        reset += row * T
    if HAS_VALID:
        valid += row * T
    i = tl.arange(0, C)
    state = tile(start + pair * K * V, V, V, K, column, i, BK, BV, False)
    for chunk in range(chunks):
        first = wide + chunk * C
        left = T - first
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        keys = tile(k + first * G * K, G * K, K, left, 0, kept, C, BK, HAS_VALID)
        values = tile(v + first * G * V, G * V, V, left, column, kept, C, BV, HAS_VALID).to(tl.float32)
        inverted = tl.load(solved + (pair * chunks + chunk) * (C * C) + i[:, None] * C + i[None, :])
        since, until, total = factors(g, reset, valid, first, left, 0, G, K, C, BK, 1, HAS_RESET, HAS_VALID)
        strength = strengths(beta, valid, first, left, G, C, HAS_VALID)
        low = state.to(DOT)
        if not OUTPUT:
            to = states + (pair * chunks + chunk) * K * V
            store_tile(to, state, V, V, K, column, BK, BV)
        known = over_keys(keys.to(DOT), low, C, BK, BV, PRECISION)
        fresh = strength[:, None] * (values - since * known)
        fresh = tl.dot(inverted, fresh.to(DOT), input_precision=PRECISION).to(DOT)
        if OUTPUT:
            gates = head_gates(g, reset, valid, first, G, left, C, 1, HAS_RESET, HAS_VALID)
            between = scale * head_decays(gates, C)
            if BK > 128 and tl.float32 == DOT:
                tl.debug_barrier()  # nothing below is loaded earlier: registers are short
            for head in range(N):
                queries = tile(
                    q + (own + first * G) * N * K + head * K, G * N * K, K, left, 0, kept, C, BK, HAS_VALID
                ).to(DOT)
                product = over_keys(queries, tl.trans(keys.to(DOT)), C, BK, C, PRECISION) * between
                out = over_keys(queries, low, C, BK, BV, PRECISION) * (scale * since)
                out = tl.dot(product.to(DOT), fresh, acc=out, input_precision=PRECISION)
                if HAS_VALID:
                    out = tl.where(kept[:, None], out, 0.0)
                to = o + (own + first * G) * N * V + head * V
                store_tile(to, out, G * N * V, V, left, column, C, BV)
        else:
            store_tile(written + (own + first * G) * V, fresh, G * V, V, left, column, C, BV)
        entering = (keys.to(tl.float32) * until).to(DOT)
        state = tl.dot(
            tl.trans(entering), fresh, acc=state * tl.exp2(total)[:, None], input_precision=PRECISION
        )
    if OUTPUT:
        store_tile(last + pair * K * V, state, V, V, K, column, BK, BV)
