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
def count_of(x, threshold, edge, cap):
    """Count before the cap and after it. NaN falls through the comparisons."""
    count = round_half_even(tl.div_rn(x, threshold))
    count = tl.where(tl.abs(x) < edge, 0.0, count)
    capped = tl.where(count > cap, cap, tl.where(count < -cap, -cap, count))
    return count, capped


@triton.jit
def as_int8(count):
    """int8, with 0 for NaN."""
    return tl.where(count == count, count, 0.0).to(tl.int8)
