"""Kernels of the gated delta rule that go backward.

With u = (I + N)^-1 r as in triton_forward.py, and du what the outputs and later states want of u,
``reverse`` carries the gradient of the state from the last chunk to the first and finds, per chunk,
dr = (I + N)^-T du (hence dv_i = beta_i dr_i); it stores dr and the gradients of the states. ``gradients``
then forms the rest for all chunks at once, with dN_ij = -dr_i u_j^T. As in gated linear attention the
gradient of a decay is a sum over the pairs j < t <= i alone, so that nothing cancels.
"""

import triton
import triton.language as tl

from spikelm.kernels.gated_delta.triton_forward import strengths
from spikelm.kernels.gla.triton_common import (
    factors,
    head_decays,
    head_gates,
    mask_row,
    over_keys,
    store_tile,
    tile,
)


@triton.jit(do_not_specialize=["T"])
def reverse(
    grad_o,
    q,
    k,
    g,
    beta,
    reset,
    valid,
    grad_last,
    solved,
    wanted,
    slopes,
    dv,
    grad_first,
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
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sweep from the last chunk to the first. Grid: (blocks of V, B G).

    Gives dv and ``wanted``, dr, both [B, T, G, V], gradients of the states after each chunk
    [B G, chunks, K, V] and of the first state [B, G, K, V].
    """
    column = tl.program_id(0) * BV
    pair = tl.program_id(1).to(tl.int64)
    wide = pair * 0
    row, group = pair // G, pair % G
    own = row * T * G + group
    chunks = tl.cdiv(T, C)
    k += own * K
    g += own
    beta += own
    if HAS_RESET:
        reset += row * T
    if HAS_VALID:
        valid += row * T
    i = tl.arange(0, C)
    slope = tile(grad_last + pair * K * V, V, V, K, column, i, BK, BV, False)
    for step in range(chunks):
        chunk = chunks - 1 - step
        first = wide + chunk * C
        left = T - first
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        keys = tile(k + first * G * K, G * K, K, left, 0, kept, C, BK, HAS_VALID)
        transposed = tl.load(solved + (pair * chunks + chunk) * (C * C) + i[None, :] * C + i[:, None])
        since, until, total = factors(g, reset, valid, first, left, 0, G, K, C, BK, 1, HAS_RESET, HAS_VALID)
        gates = head_gates(g, reset, valid, first, G, left, C, 1, HAS_RESET, HAS_VALID)
        between = scale * tl.trans(head_decays(gates, C))
        strength = strengths(beta, valid, first, left, G, C, HAS_VALID)[:, None]
        store_tile(slopes + (pair * chunks + chunk) * K * V, slope, V, V, K, column, BK, BV)
        entering = (keys.to(tl.float32) * until).to(DOT)
        to_written = over_keys(entering, slope.to(DOT), C, BK, BV, PRECISION)
        slope = slope * tl.exp2(total)[:, None]
        for head in range(N):
            queries = tile(
                q + (own + first * G) * N * K + head * K, G * N * K, K, left, 0, kept, C, BK, HAS_VALID
            )
            grads = tile(
                grad_o + (own + first * G) * N * V + head * V,
                G * N * V,
                V,
                left,
                column,
                kept,
                C,
                BV,
                HAS_VALID,
            ).to(DOT)
            product = over_keys(keys.to(DOT), tl.trans(queries.to(DOT)), C, BK, C, PRECISION) * between
            to_written = tl.dot(product.to(DOT), grads, acc=to_written, input_precision=PRECISION)
            carried = (queries.to(tl.float32) * (scale * since)).to(DOT)
            slope = tl.dot(tl.trans(carried), grads, acc=slope, input_precision=PRECISION)
        fresh = tl.dot(transposed, to_written.to(DOT), input_precision=PRECISION)
        store_tile(wanted + (own + first * G) * V, fresh, G * V, V, left, column, C, BV)
        fresh = strength * fresh
        store_tile(dv + (own + first * G) * V, fresh, G * V, V, left, column, C, BV)
        erased = (-since * fresh).to(DOT)
        slope = tl.dot(tl.trans(keys.to(DOT)), erased, acc=slope, input_precision=PRECISION)
    store_tile(grad_first + pair * K * V, slope, V, V, K, column, BK, BV)


@triton.jit(do_not_specialize=["B", "T"])
def gradients(
    grad_o,
    q,
    k,
    v,
    g,
    beta,
    reset,
    valid,
    states,
    slopes,
    written,
    wanted,
    dq,
    dk,
    dg,
    dbeta,
    scale,
    B,
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
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk, and of dg and dbeta [blocks of K, B, T, G] the share of each block.

    Grid: (chunks, B G, blocks of K).
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    key_column = block * BK
    row, group = pair // G, pair % G
    first = pair * 0 + chunk * C
    left = T - first
    own = row * T * G + group
    at = own + first * G
    partial = (pair * 0 + block) * B * T * G + at
    if HAS_RESET:
        reset += row * T
    if HAS_VALID:
        valid += row * T
    i = tl.arange(0, C)
    c = key_column + tl.arange(0, BK)
    below = i[:, None] > i[None, :]
    kept = i < left
    if HAS_VALID:
        kept = mask_row(valid + first, left, C)
    loaded = tile(k + at * K, G * K, K, left, key_column, kept, C, BK, HAS_VALID)
    keys = loaded.to(tl.float32)
    since, until, total = factors(
        g + own, reset, valid, first, left, key_column, G, K, C, BK, 1, HAS_RESET, HAS_VALID
    )
    between = head_decays(head_gates(g + own, reset, valid, first, G, left, C, 1, HAS_RESET, HAS_VALID), C)
    strength = strengths(beta + own, valid, first, left, G, C, HAS_VALID)

    # What was written, and the system that it solves.
    to_keys = tl.zeros([C, BK], dtype=tl.float32)
    to_known = tl.zeros([C, BK], dtype=tl.float32)
    product = tl.zeros([C, C], dtype=tl.float32)
    product_t = tl.zeros([C, C], dtype=tl.float32)
    to_strength = tl.zeros([C], dtype=tl.float32)
    passing = tl.zeros([BK], dtype=tl.float32)
    for column in range(0, V, BV):
        a = column + tl.arange(0, BV)
        inside = (a < V)[:, None] & (c < K)[None, :]
        across = (pair * chunks + chunk) * K * V + c[None, :] * V + a[:, None]
        state = tl.load(states + across, mask=inside, other=0.0)
        slope = tl.load(slopes + across, mask=inside, other=0.0)
        passing += tl.sum(state.to(tl.float32) * slope.to(tl.float32), axis=0)
        fresh = tile(written + at * V, G * V, V, left, column, kept, C, BV, False)
        pull = tile(wanted + at * V, G * V, V, left, column, kept, C, BV, False)
        if block == 0:
            values = tile(v + at * V, G * V, V, left, column, kept, C, BV, HAS_VALID)
            to_strength += tl.sum(values.to(tl.float32) * pull.to(tl.float32), axis=1)
        to_keys = tl.dot(fresh, slope, acc=to_keys, input_precision=PRECISION)
        to_known = tl.dot(pull, state, acc=to_known, input_precision=PRECISION)
        product = tl.dot(pull, tl.trans(fresh), acc=product, input_precision=PRECISION)
        product_t = tl.dot(fresh, tl.trans(pull), acc=product_t, input_precision=PRECISION)
    to_keys *= until
    left_of = tl.sum(keys * to_keys, axis=1)
    to_gates = tl.cumsum(left_of, axis=0) - left_of + tl.sum(passing * tl.exp2(total))
    to_known *= -since
    known = tl.sum(keys * to_known, axis=1)
    to_strength += known
    right_of = strength * known
    to_keys += strength[:, None] * to_known
    likeness = tl.dot(loaded.to(DOT), tl.trans(loaded.to(DOT)), input_precision=PRECISION) * between
    product = tl.where(below, -product, 0.0)
    to_strength += tl.sum(product * likeness, axis=1)
    reach = product * likeness * strength[:, None]
    down = (product * between * strength[:, None]).to(DOT)
    to_keys = tl.dot(down, loaded.to(DOT), acc=to_keys, input_precision=PRECISION)
    above = i[:, None] < i[None, :]
    down_t = (tl.where(above, -product_t, 0.0) * tl.trans(between) * strength[None, :]).to(DOT)
    to_keys = tl.dot(down_t, loaded.to(DOT), acc=to_keys, input_precision=PRECISION)

    # The outputs of each query head.
    for head in range(N):
        to_queries = tl.zeros([C, BK], dtype=tl.float32)
        to_weights = tl.zeros([C, C], dtype=tl.float32)
        to_weights_t = tl.zeros([C, C], dtype=tl.float32)
        for column in range(0, V, BV):
            a = column + tl.arange(0, BV)
            inside = (a < V)[:, None] & (c < K)[None, :]
            across = (pair * chunks + chunk) * K * V + c[None, :] * V + a[:, None]
            state = tl.load(states + across, mask=inside, other=0.0)
            fresh = tile(written + at * V, G * V, V, left, column, kept, C, BV, False)
            grads = tile(
                grad_o + at * N * V + head * V, G * N * V, V, left, column, kept, C, BV, HAS_VALID
            ).to(DOT)
            to_queries = tl.dot(grads, state, acc=to_queries, input_precision=PRECISION)
            to_weights = tl.dot(grads, tl.trans(fresh), acc=to_weights, input_precision=PRECISION)
            to_weights_t = tl.dot(fresh, tl.trans(grads), acc=to_weights_t, input_precision=PRECISION)
        queries = tile(q + at * N * K + head * K, G * N * K, K, left, key_column, kept, C, BK, HAS_VALID)
        to_queries *= since
        right_of += tl.sum(queries.to(tl.float32) * to_queries, axis=1) * scale
        product = tl.dot(queries.to(DOT), tl.trans(loaded.to(DOT)), input_precision=PRECISION) * between
        reach += tl.where(below, product * to_weights * scale, 0.0)
        down = (to_weights * between).to(DOT)
        to_queries = tl.dot(down, loaded.to(DOT), acc=to_queries, input_precision=PRECISION) * scale
        store_tile(dq + at * N * K + head * K, to_queries, G * N * K, K, left, key_column, C, BK)
        down_t = (to_weights_t * tl.trans(between)).to(DOT)
        to_keys += tl.dot(down_t, queries.to(DOT), input_precision=PRECISION) * scale
    store_tile(dk + at * K, to_keys, G * K, K, left, key_column, C, BK)

    to_gates += tl.cumsum(right_of, axis=0, reverse=True)
    reach = tl.where(below, tl.cumsum(reach, axis=0, reverse=True), 0.0)
    to_gates += tl.sum(reach, axis=1)
    writes = kept
    if HAS_RESET:
        writes = kept & (mask_row(reset + first, left, C) == 0)
    tl.store(dg + partial + i * G, tl.where(writes, to_gates, 0.0), mask=i < left)
    tl.store(dbeta + partial + i * G, tl.where(kept, to_strength, 0.0), mask=i < left)
