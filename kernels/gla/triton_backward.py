"""The GLA kernel that goes backward in time: every gradient, in one sweep over the chunks.

It carries the gradient of the state (transposed, [V, K], so that no product takes a transposed accumulator)
and reads the state before each chunk, which ``sweep`` has stored. The gradient of a gate,
dg_t = sum over pairs j < t <= i, is a sum of these pairs alone, never a difference of all pairs of the queries
and all pairs of the keys, which cancels under strong decay. A pair (i, j) is one of

- state before the chunk, state after it: reaches every t of the chunk;
- state before, i in the chunk: t <= i, a sum from the end; j in the chunk, state after: t > j, a sum from the
  start;
- both in the chunk: joined by one level of the doubling (i in a right block: t <= i within it; j in the left
  block: t > j within it). Where gates are mild the chunk is one block, and there alone the pairs with
  j >= t are subtracted; both sums hold the same rounded factors, so that they cancel to float32's precision.
"""

import triton
import triton.language as tl

from spikelm.kernels.gla.triton_common import factors, head_decays, head_gates, mask_row, store_tile, tile


@triton.jit
def _part(
    grad_o, q, k, g, reset, valid, state, weights, flag, dq, dk, dg,
    slope, to_values, to_gates, right_of, values, between,
    scale, first, left, kept, column, value_column, chunks, G,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, GATE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients that belong to BK key channels; adds to ``to_values`` [BV, C] and, for gates per head, to
    ``to_gates`` and ``right_of`` [C]. Returns these and the gradient of the state before the chunk."""
    i = tl.arange(0, C)
    loaded = tile(k + first * G * K, G * K, K, left, column, kept, C, BK, HAS_VALID)
    keys = loaded.to(tl.float32)
    low = slope.to(DOT)
    since, until, total = factors(g, reset, valid, first, left, column, G, K, C, BK, GATE, HAS_RESET, HAS_VALID)
    decay = tl.exp2(total)[None, :]
    to_keys = tl.dot(values, low, input_precision=PRECISION) * until
    to_values = tl.dot(low, tl.trans((keys * until).to(DOT)), acc=to_values, input_precision=PRECISION)
    if GATE > 0:
        passing = tl.sum(slope * state.to(tl.float32), axis=0)
        left_of = keys * to_keys
        if GATE == 2:
            here = tl.cumsum(left_of, axis=0) - left_of + passing[None, :] * decay
            right_here = tl.zeros([C, BK], dtype=tl.float32)
        else:
            left_sum = tl.sum(left_of, axis=1)
            to_gates += tl.cumsum(left_sum, axis=0) - left_sum
            to_gates += tl.sum(passing[None, :] * decay)
    slope = slope * decay
    strong = False
    if GATE == 2:
        strong = tl.load(flag) != 0

    for head in range(N):
        queries = tile(q + first * G * N * K + head * K, G * N * K, K, left, column, kept, C, BK, HAS_VALID)
        grads = tile(
            grad_o + first * G * N * V + head * V, G * N * V, V, left, value_column, kept, C, BV, HAS_VALID
        ).to(DOT)
        carrying = queries.to(tl.float32) * scale * since
        carried = carrying.to(DOT)
        to_queries = tl.dot(grads, state.to(DOT), input_precision=PRECISION)
        if GATE == 2:
            right_here += carrying * to_queries
            to_queries *= since
            if strong:
                at = weights + (first * 0 + head) * chunks * (PARTS * C * C)
                product = tl.load(at + i[:, None] * C + i[None, :]).to(tl.float32)
            else:
                lift = until * tl.exp2(-total)[None, :]
                near = (keys * lift).to(DOT)
                product = tl.dot(carried, tl.trans(near), input_precision=PRECISION)
                product = tl.where(i[:, None] >= i[None, :], product, 0.0)
                to_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
                down = tl.where(i[:, None] >= i[None, :], to_weights, 0.0).to(DOT)
                push = tl.dot(down, near, input_precision=PRECISION)
                to_weights_t = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
                down_t = tl.where(i[:, None] <= i[None, :], to_weights_t, 0.0).to(DOT)
                pull = tl.dot(down_t, carried, input_precision=PRECISION)
                to_queries += push * since
                to_keys += pull * lift
                right_here += carried.to(tl.float32) * push - near.to(tl.float32) * pull
        else:
            if GATE == 1:
                right_of += tl.sum(carrying * to_queries, axis=1)
            to_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            to_weights_t = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
            product = tl.dot(queries.to(DOT), tl.trans(loaded.to(DOT)), input_precision=PRECISION)
            product = product * scale * between
            down = (to_weights * between).to(DOT)
            down_t = (to_weights_t * tl.trans(between)).to(DOT)
            to_queries = tl.dot(down, loaded.to(DOT), acc=to_queries * since, input_precision=PRECISION)
            to_keys += tl.dot(down_t, queries.to(DOT), input_precision=PRECISION) * scale
            if GATE == 1:
                below = i[:, None] > i[None, :]
                reach = tl.cumsum(tl.where(below, product * to_weights, 0.0), axis=0, reverse=True)
                to_gates += tl.sum(tl.where(below, reach, 0.0), axis=1)
        to_values = tl.dot(tl.trans(grads), product.to(DOT), acc=to_values, input_precision=PRECISION)
        slope = tl.dot(tl.trans(grads), carried, acc=slope, input_precision=PRECISION)
        to_queries *= scale
        at_queries = dq + first * G * N * K + head * K
        if GATE == 2:
            if strong & (value_column == 0):
                to_queries += tile(at_queries, G * N * K, K, left, column, kept, C, BK, False).to(tl.float32)
        store_tile(at_queries, to_queries, G * N * K, K, left, column, C, BK)

    at_keys = dk + first * G * K
    if GATE == 2:
        at_gates = dg + first * G * K
        here += tl.cumsum(right_here, axis=0, reverse=True)
        if strong & (value_column == 0):
            to_keys += tile(at_keys, G * K, K, left, column, kept, C, BK, False).to(tl.float32)
            here += tile(at_gates, G * K, K, left, column, kept, C, BK, False).to(tl.float32)
        if HAS_RESET:
            kept = kept & (mask_row(reset + first, left, C) == 0)
        here = tl.where(kept[:, None], here, 0.0)
        store_tile(at_gates, here, G * K, K, left, column, C, BK)
    store_tile(at_keys, to_keys, G * K, K, left, column, C, BK)
    return slope, to_values, to_gates, right_of


@triton.jit
def backward(
    grad_o, q, k, v, g, reset, valid, states, grad_ends, weights, flags, dq, dk, dv, dg, grad_first,
    scale, B, T, G, chunks,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, GATE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of q, k, v, g and of the state before the first token.

    Grid: (blocks of V, B G, segments). ``states`` [B G, chunks, V, K] before each chunk, ``grad_ends``
    [B, G, segments, K, V] after each segment. dq, dk and dg are [blocks of V, B, T, ...]: partial sums over V
    where there are several blocks; in strong chunks the first block holds what their pairs give.
    """
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(0) * BV
    pair = tl.program_id(1).to(tl.int64)
    segment, segments = tl.program_id(2), tl.num_programs(2)
    wide = pair * 0  # int64, so that offsets of long texts do not overflow
    row, group = pair // G, pair % G
    token = row * T
    partial = (block * B * T + token) * G + group
    own = token * G + group
    all_chunks = tl.cdiv(T, C)
    k += own * K
    v += own * V
    q += own * N * K
    grad_o += own * N * V
    dq += partial * N * K
    dk += partial * K
    dv += own * V
    if GATE == 1:
        g += own
        dg += partial
    if GATE == 2:
        g += own * K
        dg += partial * K
        weights += pair * N * all_chunks * PARTS * C * C
        flags += pair * all_chunks * PARTS
    if HAS_RESET:
        reset += token
    if HAS_VALID:
        valid += token
    i = tl.arange(0, C)
    a = column + tl.arange(0, BV)
    c = tl.arange(0, BK)
    rows = (a < V)[:, None]
    across = c[None, :] * V + a[:, None]
    along = a[:, None] * K + c[None, :]
    ends = grad_ends + (pair * segments + segment) * K * V
    slope = tl.load(ends + across, mask=rows & (c < K)[None, :], other=0.0)
    if PARTS == 2:
        slope_2 = tl.load(ends + BK * V + across, mask=rows & (c < K - BK)[None, :], other=0.0)
    lowest, highest = segment * chunks, min((segment + 1) * chunks, all_chunks)

    for step in range(lowest, highest):
        chunk = lowest + highest - 1 - step
        first = wide + chunk * C
        left = T - first
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        values = tile(v + first * G * V, G * V, V, left, column, kept, C, BV, HAS_VALID).to(DOT)
        before = states + (pair * all_chunks + chunk) * K * V
        to_values = tl.zeros([BV, C], dtype=tl.float32)
        to_gates = tl.zeros([C], dtype=tl.float32)
        right_of = tl.zeros([C], dtype=tl.float32)
        between = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
        if GATE < 2 and (GATE == 1 or HAS_RESET):
            between = head_decays(head_gates(g, reset, valid, first, G, left, C, GATE, HAS_RESET, HAS_VALID), C)
        at, flag = weights, flags
        if GATE == 2:
            flag = flags + chunk * PARTS
            at = weights + (wide + chunk) * (PARTS * C * C)
        state = tl.load(before + along, mask=rows & (c < K)[None, :], other=0.0)
        slope, to_values, to_gates, right_of = _part(
            grad_o, q, k, g, reset, valid, state, at, flag, dq, dk, dg,
            slope, to_values, to_gates, right_of, values, between,
            scale, first, left, kept, 0, column, all_chunks, G,
            K, V, N, C, BK, BV, PARTS, GATE, HAS_RESET, HAS_VALID, DOT, PRECISION,
        )
        if PARTS == 2:
            if GATE == 2:
                flag += 1
                at += C * C
            state = tl.load(before + BK + along, mask=rows & (c < K - BK)[None, :], other=0.0)
            slope_2, to_values, to_gates, right_of = _part(
                grad_o, q, k, g, reset, valid, state, at, flag, dq, dk, dg,
                slope_2, to_values, to_gates, right_of, values, between,
                scale, first, left, kept, BK, column, all_chunks, G,
                K, V, N, C, BK, BV, PARTS, GATE, HAS_RESET, HAS_VALID, DOT, PRECISION,
            )
        tl.store(
            dv + first * G * V + i[None, :] * (G * V) + a[:, None],
            to_values.to(dv.dtype.element_ty),
            mask=(i < left)[None, :] & rows,
        )
        if GATE == 1:
            if HAS_RESET:
                kept = kept & (mask_row(reset + first, left, C) == 0)
            to_gates = tl.where(kept, to_gates + tl.cumsum(right_of, axis=0, reverse=True), 0.0)
            tl.store(dg + first * G + i * G, to_gates.to(dg.dtype.element_ty), mask=i < left)

    if segment == 0:
        grad_first += pair * K * V
        tl.store(grad_first + across, slope, mask=rows & (c < K)[None, :])
        if PARTS == 2:
            tl.store(grad_first + BK * V + across, slope_2, mask=rows & (c < K - BK)[None, :])
