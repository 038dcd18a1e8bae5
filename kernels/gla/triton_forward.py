"""The GLA kernel that gives the outputs.

A program holds one state (or a block of its columns) in float32 registers and walks the chunks of a segment
of the text. A text is one segment where heads and rows fill the device; else it is cut into several, and
triton_sweep.py first finds the state at the start of each (two passes).
"""

import triton
import triton.language as tl

from spikelm.kernels.gla.triton_common import (
    factors,
    head_decays,
    head_gates,
    mask_row,
    over_keys,
    store_tile,
    tile,
)


@triton.jit
def _part(
    q,
    k,
    g,
    reset,
    valid,
    weights,
    flag,
    state,
    out,
    product,
    scale,
    first,
    left,
    kept,
    column,
    G: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what BK key channels give to ``out`` [C, BV] and ``product`` [C, C].

    Returns these, the keys decayed to the chunk's end [C, BK] and the decay of the state over the chunk.
    """
    i = tl.arange(0, C)
    if tl.float32 == DOT:
        tl.debug_barrier()  # nothing below is loaded earlier: full products take most registers
    keys = tile(k + first * G * K, G * K, K, left, column, kept, C, BK, HAS_VALID)
    queries = tile(q + first * G * N * K, G * N * K, K, left, column, kept, C, BK, HAS_VALID)
    since, until, total = factors(
        g, reset, valid, first, left, column, G, K, C, BK, GATE, HAS_RESET, HAS_VALID
    )
    carried = (queries.to(tl.float32) * scale * since).to(DOT)
    entering = keys.to(tl.float32) * until
    out += over_keys(carried, state.to(DOT), C, BK, BV, PRECISION)
    if GATE == 2:
        if tl.load(flag) != 0:
            more = tl.load(weights + i[:, None] * C + i[None, :]).to(tl.float32)
        else:
            near = (entering * tl.exp2(-total)[None, :]).to(DOT)
            more = over_keys(carried, tl.trans(near), C, BK, C, PRECISION)
            more = tl.where(i[:, None] >= i[None, :], more, 0.0)
        product += more
    else:
        product += over_keys(queries.to(DOT), tl.trans(keys.to(DOT)), C, BK, C, PRECISION)
    return out, product, entering.to(DOT), tl.exp2(total)


@triton.jit(do_not_specialize=["T", "chunks"])
def forward(
    q,
    k,
    v,
    g,
    reset,
    valid,
    starts,
    weights,
    flags,
    o,
    last,
    scale,
    T,
    chunks,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs [B, T, G N, V] and the last state [B, G, K, V].

    Grid: (blocks of V, B G, segments). ``starts`` are states [B, G, segments, K, V]; ``chunks`` is how many a
    segment has; GATE is 0 (none), 1 (one per head, g [B, T, G]) or 2 (per channel, g [B, T, G, K]). The key
    channels are in PARTS (1 or 2) parts of BK. ``weights`` are those of the strong chunks.
    """
    column = tl.program_id(0) * BV
    pair = tl.program_id(1).to(tl.int64)
    segment, segments = tl.program_id(2), tl.num_programs(2)
    wide = pair * 0  # int64, so that offsets of long texts do not overflow
    row, group = pair // G, pair % G
    token = row * T
    own = token * G + group
    k += own * K
    v += own * V
    q += own * N * K
    o += own * N * V
    if GATE == 1:
        g += own
    if GATE == 2:
        g += own * K
        weights += pair * N * tl.cdiv(T, C) * PARTS * C * C
        flags += pair * tl.cdiv(T, C) * PARTS
    if HAS_RESET:
        reset += token
    if HAS_VALID:
        valid += token
    starts += (pair * segments + segment) * K * V
    i = tl.arange(0, C)
    state = tile(starts, V, V, K, column, i, BK, BV, False)
    if PARTS == 2:
        state_2 = tile(starts + BK * V, V, V, K - BK, column, i, BK, BV, False)

    for chunk in range(segment * chunks, min((segment + 1) * chunks, tl.cdiv(T, C))):
        first = wide + chunk * C
        left = T - first
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        values = tile(v + first * G * V, G * V, V, left, column, kept, C, BV, HAS_VALID).to(DOT)
        for head in range(N):
            out = tl.zeros([C, BV], dtype=tl.float32)
            product = tl.zeros([C, C], dtype=tl.float32)
            at, flag = weights, flags
            if GATE == 2:
                flag = flags + chunk * PARTS
                at = weights + (wide + head * tl.cdiv(T, C) + chunk) * (PARTS * C * C)
            out, product, entering, decay = _part(
                q + head * K,
                k,
                g,
                reset,
                valid,
                at,
                flag,
                state,
                out,
                product,
                scale,
                first,
                left,
                kept,
                0,
                G,
                K,
                N,
                C,
                BK,
                BV,
                GATE,
                HAS_RESET,
                HAS_VALID,
                DOT,
                PRECISION,
            )
            if PARTS == 2:
                # The last head's decays carry the state over the chunk; before, it must stay.
                if N == 1:
                    state = tl.dot(
                        tl.trans(entering), values, acc=state * decay[:, None], input_precision=PRECISION
                    )
                if GATE == 2:
                    at += C * C
                    flag += 1
                out, product, entering, decay = _part(
                    q + head * K,
                    k,
                    g,
                    reset,
                    valid,
                    at,
                    flag,
                    state_2,
                    out,
                    product,
                    scale,
                    first,
                    left,
                    kept,
                    BK,
                    G,
                    K,
                    N,
                    C,
                    BK,
                    BV,
                    GATE,
                    HAS_RESET,
                    HAS_VALID,
                    DOT,
                    PRECISION,
                )
                if N == 1:
                    state_2 = tl.dot(
                        tl.trans(entering), values, acc=state_2 * decay[:, None], input_precision=PRECISION
                    )
            else:
                if N == 1:
                    state = tl.dot(
                        tl.trans(entering), values, acc=state * decay[:, None], input_precision=PRECISION
                    )
            if GATE < 2:
                if GATE == 1 or HAS_RESET:
                    gates = head_gates(g, reset, valid, first, G, left, C, GATE, HAS_RESET, HAS_VALID)
                    product = product * (scale * head_decays(gates, C))
                else:
                    product = tl.where(i[:, None] >= i[None, :], product * scale, 0.0)
            out = tl.dot(product.to(DOT), values, acc=out, input_precision=PRECISION)
            if HAS_VALID:
                out = tl.where(kept[:, None], out, 0.0)
            store_tile(o + first * G * N * V + head * V, out, G * N * V, V, left, column, C, BV)
        if N > 1:
            state = _entered(
                k,
                g,
                reset,
                valid,
                state,
                values,
                first,
                left,
                kept,
                0,
                G,
                K,
                C,
                BK,
                GATE,
                HAS_RESET,
                HAS_VALID,
                DOT,
                PRECISION,
            )
            if PARTS == 2:
                state_2 = _entered(
                    k,
                    g,
                    reset,
                    valid,
                    state_2,
                    values,
                    first,
                    left,
                    kept,
                    BK,
                    G,
                    K,
                    C,
                    BK,
                    GATE,
                    HAS_RESET,
                    HAS_VALID,
                    DOT,
                    PRECISION,
                )

    if segment == segments - 1:
        last += pair * K * V
        store_tile(last, state, V, V, K, column, BK, BV)
        if PARTS == 2:
            store_tile(last + BK * V, state_2, V, V, K - BK, column, BK, BV)


@triton.jit
def _entered(
    k,
    g,
    reset,
    valid,
    state,
    values,
    first,
    left,
    kept,
    column,
    G: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """State of BK key channels after the chunk."""
    keys = tile(k + first * G * K, G * K, K, left, column, kept, C, BK, HAS_VALID)
    since, until, total = factors(
        g, reset, valid, first, left, column, G, K, C, BK, GATE, HAS_RESET, HAS_VALID
    )
    entering = (keys.to(tl.float32) * until).to(DOT)
    state = state * tl.exp2(total)[:, None]
    return tl.dot(tl.trans(entering), values, acc=state, input_precision=PRECISION)
