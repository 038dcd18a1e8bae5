"""States alone, without outputs: what the backward pass reads, and where the segments of a text begin.

``sweep`` carries a block of the state over the chunks of a segment, forward or in reverse; it stores the
states before the chunks, or what the segment leaves. ``combine`` chains what the segments leave to the states
at their starts.
"""

import triton
import triton.language as tl

from spikelm.kernels.gla.triton_common import factors, mask_row, tile


@triton.jit(do_not_specialize=["T", "chunks"])
def sweep(
    rows,
    keys,
    g,
    reset,
    valid,
    starts,
    states,
    ends,
    decays,
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
    KEY_BLOCKS: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
    REVERSE: tl.constexpr,
    STORE: tl.constexpr,
    END: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A state (transposed, [V, K]) carried over the chunks of a segment, without outputs.

    Forward, ``rows`` are v [B, T, G, V] and ``keys`` k [B, T, G, K] (N = 1). In reverse they are the
    gradient of o [B, T, G N, V] and q [B, T, G N, K], and the state is the gradient of the state. Grid:
    (blocks of K times blocks of V, B G, segments). ``starts`` [B, G, segments, K, V] may be None for zeros.
    With STORE the state before each chunk goes to ``states`` [B G, chunks, V, K]; with END what the segment
    leaves goes to ``ends`` [B, G, segments, K, V] and its decay to ``decays`` [B, G, segments, K].
    """
    row_column = tl.program_id(0) // KEY_BLOCKS * BV
    key_column = tl.program_id(0) % KEY_BLOCKS * BK
    pair = tl.program_id(1).to(tl.int64)
    segment, segments = tl.program_id(2), tl.num_programs(2)
    wide = pair * 0  # int64, so that offsets of long texts do not overflow
    row, group = pair // G, pair % G
    token = row * T
    keys += (token * G + group) * N * K
    rows += (token * G + group) * N * V
    if GATE == 1:
        g += token * G + group
    if GATE == 2:
        g += (token * G + group) * K
    if HAS_RESET:
        reset += token
    if HAS_VALID:
        valid += token
    i = tl.arange(0, C)
    a = row_column + tl.arange(0, BV)
    c = key_column + tl.arange(0, BK)
    mask = (a < V)[:, None] & (c < K)[None, :]
    all_chunks = tl.cdiv(T, C)
    place = (pair * segments + segment) * K * V + c[None, :] * V + a[:, None]
    if starts is None:
        state = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        state = tl.load(starts + place, mask=mask, other=0.0)
    lowest, highest = segment * chunks, min((segment + 1) * chunks, all_chunks)
    passed = tl.zeros([BK], dtype=tl.float32)

    for step in range(lowest, highest):
        chunk = step
        if REVERSE:
            chunk = lowest + highest - 1 - step
        first = wide + chunk * C
        left = T - first
        if STORE:
            to = states + (pair * all_chunks + chunk) * K * V + a[:, None] * K + c[None, :]
            tl.store(to, state.to(states.dtype.element_ty), mask=mask)
        kept = i < left
        if HAS_VALID:
            kept = mask_row(valid + first, left, C)
        since, until, total = factors(
            g, reset, valid, first, left, key_column, G, K, C, BK, GATE, HAS_RESET, HAS_VALID
        )
        passed += total
        state = state * tl.exp2(total)[None, :]
        for head in range(N):
            x = tile(
                keys + first * G * N * K + head * K, G * N * K, K, left, key_column, kept, C, BK, HAS_VALID
            )
            y = tile(
                rows + first * G * N * V + head * V, G * N * V, V, left, row_column, kept, C, BV, HAS_VALID
            )
            x = x.to(tl.float32) * scale * (since if REVERSE else until)
            state = tl.dot(tl.trans(y.to(DOT)), x.to(DOT), acc=state, input_precision=PRECISION)

    if END:
        tl.store(ends + place, state, mask=mask)
        if tl.program_id(0) // KEY_BLOCKS == 0:
            tl.store(decays + (pair * segments + segment) * K + c, tl.exp2(passed), mask=c < K)


@triton.jit(do_not_specialize=["segments"])
def combine(
    ends,
    decays,
    first,
    starts,
    segments,
    K: tl.constexpr,
    V: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """States before each segment [B, G, segments, K, V], of what each leaves and how much it lets through.

    ``first`` [B, G, K, V] is the state before the first segment (in REVERSE, the gradient after the last).
    """
    pair = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < K * V
    state = tl.load(first + pair * K * V + e, mask=mask, other=0.0)
    for step in range(segments):
        segment = step
        if REVERSE:
            segment = segments - 1 - step
        at = pair * segments + segment
        tl.store(starts + at * K * V + e, state, mask=mask)
        decay = tl.load(decays + at * K + e // V, mask=mask, other=0.0)
        state = state * decay + tl.load(ends + at * K * V + e, mask=mask, other=0.0)
