"""The GLA kernels that go backward in time: ``keys`` gives dq, dk and dg, ``values`` (triton_values.py) dv.

Both carry the gradient of the state (transposed, [V, K], so that no product takes a transposed accumulator)
over the chunks from the last to the first. They are two because together they hold more tiles than there are
registers. ``keys`` works on a block of key channels and reads the state before each chunk, which ``sweep``
has stored. The gradient of a gate, dg_t = sum over pairs j < t <= i, is a sum of these pairs alone, never a
difference of all pairs of the queries and all pairs of the keys, which cancels under strong decay. A pair
is one of

- state before the chunk, state after it: reaches every t of the chunk;
- state before, i in the chunk: t <= i, a sum from the end; j in the chunk, state after: t > j, a sum from the
  start;
- both in the chunk: joined by one level of the doubling (i in a right block: t <= i within it; j in the left
  block: t > j within it), see triton_strong.py. Where gates are mild the chunk is one block, and there
  alone the pairs with j >= t are subtracted; both sums hold the same rounded factors, so that they cancel
  to float32's precision.
"""

import triton
import triton.language as tl

from spikelm.kernels.gla.triton_common import factors, head_decays, head_gates, mask_row, store_tile, tile


@triton.jit(do_not_specialize=["B", "T", "chunks"])
def keys(
    grad_o,
    q,
    k,
    v,
    g,
    reset,
    valid,
    states,
    grad_ends,
    flags,
    dq,
    dk,
    dg,
    grad_first,
    scale,
    B,
    T,
    chunks,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q, k, g and of the state before the first token.

    Grid: (blocks of V times KEY_BLOCKS, B G, segments). ``states`` [B G, chunks, V, K] before each chunk,
    ``grad_ends`` [B, G, segments, K, V] after each segment. dq, dk and dg per channel are [blocks of V, B,
    T, ...], partial sums over V; dg per head is [blocks of V times KEY_BLOCKS, B, T, G]. In strong chunks
    (``flags`` [B G, chunks, PARTS of PART channels]) the first block of V holds what their pairs give.
    """
    key_column = tl.program_id(0) % KEY_BLOCKS * BK
    column = tl.program_id(0) // KEY_BLOCKS * BV
    pair = tl.program_id(1).to(tl.int64)
    segment, segments = tl.program_id(2), tl.num_programs(2)
    wide = pair * 0  # int64, so that offsets of long texts do not overflow
    row, group = pair // G, pair % G
    token = row * T
    own = token * G + group
    partial = (tl.program_id(0) // KEY_BLOCKS).to(tl.int64) * B * T * G + own
    all_chunks = tl.cdiv(T, C)
    k += own * K
    v += own * V
    q += own * N * K
    grad_o += own * N * V
    dq += partial * N * K
    dk += partial * K
    if GATE == 1:
        g += own
        dg += tl.program_id(0).to(tl.int64) * B * T * G + own
    if GATE == 2:
        g += own * K
        dg += partial * K
        flags += pair * all_chunks * PARTS + key_column // PART
    if HAS_RESET:
        reset += token
    if HAS_VALID:
        valid += token
    i = tl.arange(0, C)
    a = column + tl.arange(0, BV)
    c = key_column + tl.arange(0, BK)
    inside = (a < V)[:, None] & (c < K)[None, :]
    across = c[None, :] * V + a[:, None]
    slope = tl.load(grad_ends + (pair * segments + segment) * K * V + across, mask=inside, other=0.0)
    lowest, highest = segment * chunks, min((segment + 1) * chunks, all_chunks)

    for step in range(lowest, highest):
        chunk = lowest + highest - 1 - step
        first = wide + chunk * C
        left = T - first
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        values = tile(v + first * G * V, G * V, V, left, column, kept, C, BV, HAS_VALID).to(DOT)
        loaded = tile(k + first * G * K, G * K, K, left, key_column, kept, C, BK, HAS_VALID)
        state = tl.load(
            states + (pair * all_chunks + chunk) * K * V + a[:, None] * K + c[None, :], mask=inside, other=0.0
        )
        here_keys = loaded.to(tl.float32)
        since, until, total = factors(
            g, reset, valid, first, left, key_column, G, K, C, BK, GATE, HAS_RESET, HAS_VALID
        )
        decay = tl.exp2(total)[None, :]
        to_keys = tl.dot(values, slope.to(DOT), input_precision=PRECISION) * until
        if GATE == 2:
            strong = tl.load(flags + chunk * PARTS)
            to_gates = here_keys * to_keys
            to_gates = tl.cumsum(to_gates, axis=0) - to_gates
            to_gates += tl.sum(slope * state.to(tl.float32), axis=0)[None, :] * decay
            right_of = tl.zeros([C, BK], dtype=tl.float32)
            lift = until * tl.exp2(-tl.maximum(total, -100.0))[None, :]  # finite where strong, and unused
            near = (here_keys * lift).to(DOT)
        elif GATE == 1:
            left_of = tl.sum(here_keys * to_keys, axis=1)
            to_gates = tl.cumsum(left_of, axis=0) - left_of
            to_gates += tl.sum(tl.sum(slope * state.to(tl.float32), axis=0)[None, :] * decay)
            right_of = tl.zeros([C], dtype=tl.float32)
        if GATE < 2 and (GATE == 1 or HAS_RESET):
            between = head_decays(
                head_gates(g, reset, valid, first, G, left, C, GATE, HAS_RESET, HAS_VALID), C
            )
        slope = slope * decay

        for head in range(N):
            queries = tile(
                q + first * G * N * K + head * K, G * N * K, K, left, key_column, kept, C, BK, HAS_VALID
            )
            grads = tile(
                grad_o + first * G * N * V + head * V, G * N * V, V, left, column, kept, C, BV, HAS_VALID
            ).to(DOT)
            carried = (queries.to(tl.float32) * scale * since).to(DOT)
            slope = tl.dot(tl.trans(grads), carried, acc=slope, input_precision=PRECISION)
            # First what goes to the keys, then what goes to the queries: few tiles are alive at a time.
            if GATE == 2:
                if strong == 0:
                    to_weights_t = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
                    down_t = tl.where(i[:, None] <= i[None, :], to_weights_t, 0.0).to(DOT)
                    pull = tl.dot(down_t, carried, input_precision=PRECISION)
                    to_keys += pull * lift
                    right_of -= near.to(tl.float32) * pull
            else:
                to_weights_t = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
                if GATE == 1 or HAS_RESET:
                    down_t = (to_weights_t * tl.trans(between)).to(DOT)
                else:
                    down_t = tl.where(i[:, None] <= i[None, :], to_weights_t, 0.0).to(DOT)
                to_keys += tl.dot(down_t, queries.to(DOT), input_precision=PRECISION) * scale

            to_queries = tl.dot(grads, state.to(DOT), input_precision=PRECISION) * since
            if GATE == 2:
                right_of += queries.to(tl.float32) * scale * to_queries
                if strong == 0:
                    to_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
                    down = tl.where(i[:, None] >= i[None, :], to_weights, 0.0).to(DOT)
                    push = tl.dot(down, near, input_precision=PRECISION)
                    right_of += carried.to(tl.float32) * push
                    to_queries += push * since
            else:
                to_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
                if GATE == 1:
                    right_of += tl.sum(queries.to(tl.float32) * scale * to_queries, axis=1)
                    product = tl.dot(queries.to(DOT), tl.trans(loaded.to(DOT)), input_precision=PRECISION)
                    product *= scale * between
                    below = i[:, None] > i[None, :]
                    reach = tl.cumsum(tl.where(below, product * to_weights, 0.0), axis=0, reverse=True)
                    to_gates += tl.sum(tl.where(below, reach, 0.0), axis=1)
                if GATE == 1 or HAS_RESET:
                    down = (to_weights * between).to(DOT)
                else:
                    down = tl.where(i[:, None] >= i[None, :], to_weights, 0.0).to(DOT)
                to_queries = tl.dot(down, loaded.to(DOT), acc=to_queries, input_precision=PRECISION)
            to_queries *= scale
            at_queries = dq + first * G * N * K + head * K
            if GATE == 2:  # noqa: SIM102 - without gates there is no ``strong``
                if (strong != 0) & (column == 0):
                    to_queries += tile(at_queries, G * N * K, K, left, key_column, kept, C, BK, False).to(
                        tl.float32
                    )
            store_tile(at_queries, to_queries, G * N * K, K, left, key_column, C, BK)

        at_keys = dk + first * G * K
        if GATE > 0 and HAS_RESET:
            kept = kept & (mask_row(reset + first, left, C) == 0)
        if GATE == 2:
            at_gates = dg + first * G * K
            to_gates += tl.cumsum(right_of, axis=0, reverse=True)
            if (strong != 0) & (column == 0):
                to_keys += tile(at_keys, G * K, K, left, key_column, kept, C, BK, False).to(tl.float32)
                to_gates += tile(at_gates, G * K, K, left, key_column, kept, C, BK, False).to(tl.float32)
            to_gates = tl.where(kept[:, None], to_gates, 0.0)
            store_tile(at_gates, to_gates, G * K, K, left, key_column, C, BK)
        if GATE == 1:
            to_gates = tl.where(kept, to_gates + tl.cumsum(right_of, axis=0, reverse=True), 0.0)
            tl.store(dg + first * G + i * G, to_gates.to(dg.dtype.element_ty), mask=i < left)
        store_tile(at_keys, to_keys, G * K, K, left, key_column, C, BK)

    if segment == 0:
        tl.store(grad_first + pair * K * V + across, slope, mask=inside)
