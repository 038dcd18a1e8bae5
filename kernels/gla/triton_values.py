"""The GLA kernel that finds the gradient of v; see triton_backward.py for the other gradients."""

import triton
import triton.language as tl

from spikelm.kernels.gla.triton_common import factors, head_decays, head_gates, mask_row, over_keys, tile


@triton.jit
def _values_part(
    grads,
    q,
    k,
    g,
    reset,
    valid,
    weights,
    flag,
    slope,
    product,
    to_values,
    leading,
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
    """The share of BK key channels and a query head in dv.

    Adds to the weights ``product`` [C, C], to the gradient of the state before the chunk, and, with the first
    head (``leading``), what the keys give to ``to_values`` [BV, C].
    """
    i = tl.arange(0, C)
    if tl.float32 == DOT:
        tl.debug_barrier()  # nothing below is loaded earlier: full products take most registers
    loaded = tile(k + first * G * K, G * K, K, left, column, kept, C, BK, HAS_VALID)
    queries = tile(q + first * G * N * K, G * N * K, K, left, column, kept, C, BK, HAS_VALID)
    since, until, total = factors(
        g, reset, valid, first, left, column, G, K, C, BK, GATE, HAS_RESET, HAS_VALID
    )
    entering = loaded.to(tl.float32) * until
    carried = (queries.to(tl.float32) * scale * since).to(DOT)
    if leading:
        low = slope.to(DOT)
        to_values += over_keys(low, tl.trans(entering.to(DOT)), BV, BK, C, PRECISION)
        slope = slope * tl.exp2(total)[None, :]
    slope = tl.dot(tl.trans(grads), carried, acc=slope, input_precision=PRECISION)
    if GATE == 2:
        if tl.load(flag) != 0:
            product += tl.load(weights + i[:, None] * C + i[None, :]).to(tl.float32)
        else:
            near = (entering * tl.exp2(-total)[None, :]).to(DOT)
            more = over_keys(carried, tl.trans(near), C, BK, C, PRECISION)
            product += tl.where(i[:, None] >= i[None, :], more, 0.0)
    else:
        product += over_keys(queries.to(DOT), tl.trans(loaded.to(DOT)), C, BK, C, PRECISION)
    return slope, product, to_values


@triton.jit(do_not_specialize=["T", "chunks"])
def values(
    grad_o,
    q,
    k,
    g,
    reset,
    valid,
    grad_ends,
    weights,
    flags,
    dv,
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
    """Gradient of v. Grid: (blocks of V, B G, segments); other arguments as in ``keys`` and ``forward``."""
    column = tl.program_id(0) * BV
    pair = tl.program_id(1).to(tl.int64)
    segment, segments = tl.program_id(2), tl.num_programs(2)
    wide = pair * 0
    row, group = pair // G, pair % G
    token = row * T
    own = token * G + group
    all_chunks = tl.cdiv(T, C)
    k += own * K
    q += own * N * K
    grad_o += own * N * V
    dv += own * V
    if GATE == 1:
        g += own
    if GATE == 2:
        g += own * K
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
        to_values = tl.zeros([BV, C], dtype=tl.float32)
        for head in range(N):
            grads = tile(
                grad_o + first * G * N * V + head * V, G * N * V, V, left, column, kept, C, BV, HAS_VALID
            ).to(DOT)
            product = tl.zeros([C, C], dtype=tl.float32)
            at, flag = weights, flags
            if GATE == 2:
                flag = flags + chunk * PARTS
                at = weights + (wide + head * all_chunks + chunk) * (PARTS * C * C)
            # The first head finds the gradient of the state after the chunk, the others add to that before.
            slope, product, to_values = _values_part(
                grads,
                q + head * K,
                k,
                g,
                reset,
                valid,
                at,
                flag,
                slope,
                product,
                to_values,
                head == 0,
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
                if GATE == 2:
                    at += C * C
                    flag += 1
                slope_2, product, to_values = _values_part(
                    grads,
                    q + head * K,
                    k,
                    g,
                    reset,
                    valid,
                    at,
                    flag,
                    slope_2,
                    product,
                    to_values,
                    head == 0,
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
            if GATE < 2:
                if GATE == 1 or HAS_RESET:
                    gates = head_gates(g, reset, valid, first, G, left, C, GATE, HAS_RESET, HAS_VALID)
                    product *= scale * head_decays(gates, C)
                else:
                    product = tl.where(i[:, None] >= i[None, :], product * scale, 0.0)
            to_values = tl.dot(tl.trans(grads), product.to(DOT), acc=to_values, input_precision=PRECISION)
        tl.store(
            dv + first * G * V + i[None, :] * (G * V) + a[:, None],
            to_values.to(dv.dtype.element_ty),
            mask=(i < left)[None, :] & rows,
        )
