"""GLA kernels for the chunks with strong decay: the pairs of tokens within them, by doubling.

They run before the kernels that carry the state, over all chunks at once, and return where the gates are
mild: there the carrying kernels form the pairs themselves. Which chunks are strong is handed over in
``flags`` [B G, chunks, parts of K], because another kernel might add the gates up in another order and
decide otherwise. Mathematics in triton_common.py.
"""

import triton
import triton.language as tl

from spikelm.kernels.gla.triton_common import (
    channel_gates,
    is_strong,
    join,
    level,
    mask_row,
    pairs,
    store_tile,
    tile,
)


@triton.jit(do_not_specialize=["T"])
def strong_forward(
    q,
    k,
    g,
    reset,
    valid,
    weights,
    flags,
    scale,
    T,
    G: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    SUB: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BOUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights [B G, N, chunks, parts of K, C, C] of the strong chunks. Grid: (chunks, B G, parts)."""
    chunk, part = tl.program_id(0), tl.program_id(2)
    chunks, parts = tl.num_programs(0), tl.num_programs(2)
    pair = tl.program_id(1).to(tl.int64)
    row, group = pair // G, pair % G
    first = pair * 0 + chunk * C
    left = T - first
    own = row * T * G + group
    i = tl.arange(0, C)
    column = part * BK
    g += own * K
    if HAS_RESET:
        reset += row * T
    if HAS_VALID:
        valid += row * T
    strong = False
    for start in range(column, column + BK, SUB):
        gates = channel_gates(g, reset, valid, first, G * K, K, left, start, C, SUB, HAS_RESET, HAS_VALID)
        strong = strong | is_strong(tl.sum(gates, axis=0), BOUND)
    tl.store(flags + (pair * chunks + chunk) * parts + part, tl.where(strong, 1, 0).to(tl.uint8))
    if strong:
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        for head in range(N):
            found = tl.zeros([C, C], dtype=tl.float32)
            for start in range(column, column + BK, SUB):
                gates = channel_gates(
                    g, reset, valid, first, G * K, K, left, start, C, SUB, HAS_RESET, HAS_VALID
                )
                keys = tile(k + (own + first * G) * K, G * K, K, left, start, kept, C, SUB, HAS_VALID)
                keys = keys.to(tl.float32)
                queries = tile(
                    q + (own + first * G) * N * K + head * K,
                    G * N * K,
                    K,
                    left,
                    start,
                    kept,
                    C,
                    SUB,
                    HAS_VALID,
                )
                scaled = queries.to(tl.float32) * scale
                near, far = gates, tl.zeros([C, SUB], dtype=tl.float32)
                found += tl.where(i[:, None] == i[None, :], tl.sum(scaled * keys, axis=1)[:, None], 0.0)
                for turn in range(LEVELS):
                    factor, right = level(near, far, 1 << turn, C)
                    low_q = tl.where(right[:, None], scaled * factor, 0.0).to(DOT)
                    low_k = tl.where(right[:, None], 0.0, keys * factor).to(DOT)
                    product = tl.dot(low_q, tl.trans(low_k), input_precision=PRECISION)
                    found += tl.where(pairs(1 << turn, C), product, 0.0)
                    near, far = join(near, far, 1 << turn, C, SUB)
            to = weights + (((pair * N + head) * chunks + chunk) * parts + part) * (C * C)
            tl.store(to + i[:, None] * C + i[None, :], found.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def strong_backward(
    grad_o,
    q,
    k,
    v,
    g,
    reset,
    valid,
    weights,
    flags,
    dq,
    dk,
    dg,
    scale,
    T,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    SUB: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BOUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights of the strong chunks, and what their pairs give to dq, dk and dg.

    Grid: (chunks, B G, parts).
    """
    chunk, part = tl.program_id(0), tl.program_id(2)
    chunks, parts = tl.num_programs(0), tl.num_programs(2)
    pair = tl.program_id(1).to(tl.int64)
    row, group = pair // G, pair % G
    first = pair * 0 + chunk * C
    left = T - first
    own = row * T * G + group
    at = own + first * G
    i = tl.arange(0, C)
    column = part * BK
    g += own * K
    if HAS_RESET:
        reset += row * T
    if HAS_VALID:
        valid += row * T
    strong = False
    for start in range(column, column + BK, SUB):
        gates = channel_gates(g, reset, valid, first, G * K, K, left, start, C, SUB, HAS_RESET, HAS_VALID)
        strong = strong | is_strong(tl.sum(gates, axis=0), BOUND)
    tl.store(flags + (pair * chunks + chunk) * parts + part, tl.where(strong, 1, 0).to(tl.uint8))
    if strong:
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        for start in range(column, column + BK, SUB):
            gates = channel_gates(g, reset, valid, first, G * K, K, left, start, C, SUB, HAS_RESET, HAS_VALID)
            keys = tile(k + at * K, G * K, K, left, start, kept, C, SUB, HAS_VALID).to(tl.float32)
            to_keys = tl.zeros([C, SUB], dtype=tl.float32)
            to_gates = tl.zeros([C, SUB], dtype=tl.float32)
            for head in range(N):
                to_weights = tl.zeros([C, C], dtype=tl.float32)
                to_weights_t = tl.zeros([C, C], dtype=tl.float32)
                for block in range(0, V, BV):
                    values = tile(v + at * V, G * V, V, left, block, kept, C, BV, HAS_VALID).to(DOT)
                    grads = tile(
                        grad_o + at * N * V + head * V, G * N * V, V, left, block, kept, C, BV, HAS_VALID
                    ).to(DOT)
                    to_weights = tl.dot(grads, tl.trans(values), acc=to_weights, input_precision=PRECISION)
                    to_weights_t = tl.dot(
                        values, tl.trans(grads), acc=to_weights_t, input_precision=PRECISION
                    )
                queries = tile(q + at * N * K + head * K, G * N * K, K, left, start, kept, C, SUB, HAS_VALID)
                scaled = queries.to(tl.float32) * scale
                itself = i[:, None] == i[None, :]
                on_diagonal = tl.sum(tl.where(itself, to_weights, 0.0), axis=1)[:, None]
                to_queries = on_diagonal * keys
                to_keys += on_diagonal * scaled
                found = tl.where(itself, tl.sum(scaled * keys, axis=1)[:, None], 0.0)
                near, far = gates, tl.zeros([C, SUB], dtype=tl.float32)
                for turn in range(LEVELS):
                    size = 1 << turn
                    factor, right = level(near, far, size, C)
                    high_q = tl.where(right[:, None], scaled * factor, 0.0)
                    high_k = tl.where(right[:, None], 0.0, keys * factor)
                    low_q, low_k = high_q.to(DOT), high_k.to(DOT)
                    product = tl.dot(low_q, tl.trans(low_k), input_precision=PRECISION)
                    joined = pairs(size, C)
                    found = tl.where(joined, product, found)
                    down = tl.where(joined, to_weights, 0.0).to(DOT)
                    # In every row one of the two is zero: queries of right blocks, keys of left ones.
                    push = tl.dot(down, low_k, input_precision=PRECISION)
                    block_i = i // size
                    joined_t = (block_i[None, :] % 2 == 1) & (block_i[None, :] == block_i[:, None] + 1)
                    down_t = tl.where(joined_t, to_weights_t, 0.0).to(DOT)
                    pull = tl.dot(down_t, low_q, input_precision=PRECISION)
                    to_queries += push * factor
                    to_keys += pull * factor
                    ends = high_q * push + high_k * pull
                    later = tl.where(right[:, None], i[None, :] >= i[:, None], i[None, :] < i[:, None])
                    reach = tl.where((block_i[:, None] == block_i[None, :]) & later, 1.0, 0.0).to(DOT)
                    to_gates = tl.dot(reach, ends.to(DOT), acc=to_gates, input_precision=PRECISION)
                    near, far = join(near, far, size, C, SUB)
                to = weights + (((pair * N + head) * chunks + chunk) * parts + part) * (C * C)
                to += i[:, None] * C + i[None, :]
                if start > column:
                    tl.debug_barrier()  # what other threads of the block have stored is read
                    found += tl.load(to).to(tl.float32)
                    tl.debug_barrier()
                tl.store(to, found.to(weights.dtype.element_ty))
                store_tile(dq + at * N * K + head * K, to_queries * scale, G * N * K, K, left, start, C, SUB)
            store_tile(dk + at * K, to_keys, G * K, K, left, start, C, SUB)
            store_tile(dg + at * K, to_gates, G * K, K, left, start, C, SUB)
