"""Pieces of the GLA kernels: tiles of a chunk, sums of log gates, weights of the tokens for each other.

A chunk is a tile of C tokens (rows) by BK key channels. Log gates are kept in base 2. ``since`` is the sum of
the gates from the chunk's start to a token, the token's own included, ``until`` that of the gates after it to
the chunk's end; both are sums of the tokens' own gates, never differences of larger sums, so that a gate of
-inf (or a reset, which is the same) gives exactly zero and small gates survive beside large ones.

Within a chunk token i sees token j < i with weight sum_c q_ic k_jc 2^(since_ic - since_jc). Where the gates
of the whole chunk add up to no less than -BOUND, that is one product of two tiles on tensor cores:
``q 2^since`` with ``k 2^until 2^-total``. Otherwise, decided per tile inside the kernel, neighbouring blocks
of 1, 2, 4, ... tokens are joined as in doubling.py: each pair of blocks is a product of factors <= 1, exact
for any gate. The tokens' own pairs (i = j) carry no gate.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(
    base,
    stride,
    width: tl.constexpr,
    rows_left,
    first_column,
    valid,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Tile [C, BLOCK] of rows ``stride`` apart; zero outside, and where ``valid`` (a tile [C]) is false."""
    i = tl.arange(0, C)
    c = first_column + tl.arange(0, BLOCK)
    mask = (i < rows_left)[:, None]
    if width % BLOCK != 0:
        mask = mask & (c < width)[None, :]
    if HAS_VALID:
        mask = mask & valid[:, None]
    return tl.load(base + i[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    base, x, stride, width: tl.constexpr, rows_left, first_column, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Store a tile [C, BLOCK] in the element type of ``base``."""
    i = tl.arange(0, C)
    c = first_column + tl.arange(0, BLOCK)
    mask = (i < rows_left)[:, None]
    if width % BLOCK != 0:
        mask = mask & (c < width)[None, :]
    tl.store(base + i[:, None] * stride + c[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def mask_row(base, rows_left, C: tl.constexpr):
    """Booleans [C] of a mask; false outside."""
    i = tl.arange(0, C)
    return tl.load(base + i, mask=i < rows_left, other=0) != 0


@triton.jit
def channel_gates(
    g,
    reset,
    valid,
    first,
    stride,
    K: tl.constexpr,
    rows_left,
    first_column,
    C: tl.constexpr,
    BK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Log2 gates [C, BK] of the tokens from ``first``: 0 at invalid tokens, -inf at resets."""
    kept = tl.arange(0, C) < rows_left
    if HAS_VALID:
        kept = mask_row(valid + first, rows_left, C)
    x = tile(g + first * stride, stride, K, rows_left, first_column, kept, C, BK, HAS_VALID)
    x = x.to(tl.float32) * LOG2E
    if HAS_RESET:
        x = tl.where(mask_row(reset + first, rows_left, C)[:, None], float("-inf"), x)
    return x


@triton.jit
def head_gates(
    g,
    reset,
    valid,
    first,
    stride,
    rows_left,
    C: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Log2 gates [C] of a head from ``first``: 0 at invalid tokens and without gates, -inf at resets."""
    i = tl.arange(0, C)
    x = tl.zeros([C], dtype=tl.float32)
    if GATE == 1:
        mask = i < rows_left
        if HAS_VALID:
            mask = mask & mask_row(valid + first, rows_left, C)
        x = tl.load(g + first * stride + i * stride, mask=mask, other=0.0).to(tl.float32) * LOG2E
    if HAS_RESET:
        x = tl.where(mask_row(reset + first, rows_left, C), float("-inf"), x)
    return x


@triton.jit
def head_decays(x, C: tl.constexpr):
    """Decays [C, C] from after token j to token i, 0 above the diagonal, of log2 gates [C]."""
    i = tl.arange(0, C)
    between = tl.cumsum(tl.where(i[:, None] > i[None, :], x[:, None], 0.0), axis=0)
    return tl.where(i[:, None] >= i[None, :], tl.exp2(between), 0.0)


@triton.jit
def is_strong(total, BOUND: tl.constexpr):
    """Whether any channel's gates of the chunk add up to less than -BOUND (or to NaN)."""
    return tl.sum(tl.where(total >= -BOUND, 0, 1), axis=0) > 0


@triton.jit
def level(since, until, size, C: tl.constexpr):
    """Factor of each token in the pairs of blocks of ``size`` tokens, and whether it is in a right block."""
    i = tl.arange(0, C)
    right = (i // size) % 2 == 1
    return tl.exp2(tl.where(right[:, None], since, until)), right


@triton.jit
def join(since, until, size, C: tl.constexpr, BK: tl.constexpr):
    """Sums within blocks of ``2 size`` tokens from those within blocks of ``size``."""
    i = tl.arange(0, C)
    right = ((i // size) % 2 == 1)[:, None]
    start = i // (2 * size) * (2 * size)
    end = tl.where((i // size) % 2 == 1, start + size - 1, start + 2 * size - 1)
    other = tl.gather(since, tl.broadcast_to(end[:, None], [C, BK]), 0)
    return tl.where(right, since + other, since), tl.where(right, until, until + other)


@triton.jit
def pairs(size, C: tl.constexpr):
    """Mask [C, C] of the pairs (i, j) that a level joins: i in a right block, j in the left one beside it."""
    i = tl.arange(0, C)
    block = i // size
    return (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)


@triton.jit
def factors(
    g,
    reset,
    valid,
    first,
    left,
    column,
    G: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Decays from the chunk's start to each token and from it to the end, and the sum of all gates.

    Shapes [C, BK], [C, BK] and [BK]; without gates per channel [C, 1], [C, 1] and [1].
    """
    i = tl.arange(0, C)
    if GATE == 2:
        gates = channel_gates(g, reset, valid, first, G * K, K, left, column, C, BK, HAS_RESET, HAS_VALID)
        after = channel_gates(
            g, reset, valid, first + 1, G * K, K, left - 1, column, C, BK, HAS_RESET, HAS_VALID
        )
    else:
        gates = head_gates(g, reset, valid, first, G, left, C, GATE, HAS_RESET, HAS_VALID)[:, None]
        after = head_gates(g, reset, valid, first + 1, G, left - 1, C, GATE, HAS_RESET, HAS_VALID)[:, None]
    after = tl.where((i < C - 1)[:, None], after, 0.0)
    since = tl.exp2(tl.cumsum(gates, axis=0))
    until = tl.exp2(tl.cumsum(after, axis=0, reverse=True))
    return since, until, tl.sum(gates, axis=0)


@triton.jit
def over_keys(a, b, M: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """a [M, BK] times b [BK, N], summed over key channels.

    Full float32 products keep whole rows of both operands in each thread's registers, and products of few
    rows a copy in every warp: there channels are multiplied in blocks of 32, which are added up then.
    """
    if BK > 128 or (BK > 32 and a.dtype == tl.float32):
        left = tl.permute(tl.reshape(a, [M, BK // 32, 32]), [1, 0, 2])
        right = tl.reshape(b, [BK // 32, 32, N])
        return tl.sum(tl.dot(left, right, input_precision=PRECISION), axis=0)
    else:
        return tl.dot(a, b, input_precision=PRECISION)
