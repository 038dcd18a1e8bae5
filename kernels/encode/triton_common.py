"""Triton kernels of adaptive spike encoding (equations in reference.py).

A program owns ROWS rows. Rows up to WHOLE features stay in registers between the mean and the counts; longer
ones are read twice, the second time from the cache. How a row is summed depends on its length alone, so its
counts are the same in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """Nearest integer, ties to even. Adding 2^23 leaves no room for fractions."""
    size = tl.abs(x)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def threshold_of(mean, k):
    """mean / k, at least 1e-8; NaN stays NaN."""
    wanted = tl.div_rn(mean, k)
    return tl.where(wanted < 1e-8, 1e-8, wanted)


@triton.jit
def counts_of(x, threshold, edge, cap, DEAD: tl.constexpr, INT8: tl.constexpr):
    """Count before the cap and after it, of a tile.

    x / V is rounded by a product with 1 / V, exact but near a half; where any element of the tile lies within
    a few roundings of one (or is huge, or no number), the tile is divided. DEAD: there is a dead zone.
    INT8: capped has 0 for NaN.
    """
    inverse = tl.div_rn(1.0, threshold)
    count = (x * inverse + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no room for fractions
    off = tl.abs(x * inverse - count)
    sure = off + tl.abs(count) * 4.76837158203125e-07 < 0.4999995
    capped = tl.minimum(tl.maximum(count, -cap), cap)
    if tl.max(tl.max(tl.where(sure, 0.0, 1.0), 1), 0) > 0.0:
        count = round_half_even(tl.div_rn(x, threshold))
        capped = tl.where(count > cap, cap, tl.where(count < -cap, -cap, count))
        if INT8:
            capped = tl.where(capped == capped, capped, 0.0)
    if DEAD:
        count = tl.where(tl.abs(x) < edge, 0.0, count)
        capped = tl.where(tl.abs(x) < edge, 0.0, capped)
    return count, capped


@triton.jit
def as_int8(capped):
    """int8 of a count up to 127: the low byte of its sum with 1.5 * 2^23."""
    bits = (capped + 12582912.0).to(tl.int32, bitcast=True)
    return bits.to(tl.int8)
