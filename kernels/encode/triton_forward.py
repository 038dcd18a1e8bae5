"""Forward Triton kernel of adaptive spike encoding: counts, threshold and, where asked for, statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from spikelm.kernels.encode.triton_common import as_int8, counts_of, threshold_of


@triton.jit
def _statistics(count, capped, cap, padding):
    """Silent channels, sum of |count|, counts cut off and largest |count| of every row."""
    # Whole numbers below 2^24: float32 adds them exactly. Padding holds zeros.
    size = tl.abs(capped)
    silent = tl.sum(tl.where(size == 0.0, 1.0, 0.0), 1) - padding
    clipped = tl.sum(tl.where(tl.abs(count) > cap, 1.0, 0.0), 1)
    return silent, tl.sum(size, 1), clipped, tl.max(size, 1)


@triton.jit
def _store_counts(counts_ptr, at, capped, inside):
    if counts_ptr.dtype.element_ty == tl.int8:
        tl.store(counts_ptr + at, as_int8(capped), mask=inside)
    else:
        tl.store(counts_ptr + at, capped.to(counts_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width"])
def encode_forward_kernel(
    x_ptr,  # [N, D]
    mean_ptr,  # fp32 [N], mean|x| of whole rows; None: of these rows
    counts_ptr,  # fp32 or int8 [N, D]
    threshold_ptr,  # fp32 [N]
    edge_ptr,  # fp32 [N], edge of the dead zone; None where no gradient will be asked for
    statistics_ptr,  # int64 [N, 4]; None
    k,
    dead_zone,
    cap,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row fits one block
    DEAD: tl.constexpr,  # there is a dead zone
    ALIGN: tl.constexpr,  # width is a multiple of it
):
    """Everything of ROWS rows."""
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    column = tl.arange(0, BLOCK)[None, :]
    start = (row.to(tl.int64) * width)[:, None]
    if WHOLE:
        inside = there[:, None] & (column < width)
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row, mask=there, other=1.0)
    else:
        if WHOLE:
            total = tl.sum(tl.abs(x), 1)
        else:
            partial = tl.zeros([ROWS, BLOCK], tl.float32)
            for first in range(0, width, BLOCK):
                mask = there[:, None] & (first + column < width)
                partial += tl.abs(
                    tl.load(x_ptr + start + first + column, mask=mask, other=0.0).to(tl.float32)
                )
            total = tl.sum(partial, 1)
        mean = tl.div_rn(total, width.to(tl.float32))
    threshold = threshold_of(mean, k)
    edge = dead_zone * mean
    tl.store(threshold_ptr + row, threshold, mask=there)
    if edge_ptr is not None:
        tl.store(edge_ptr + row, edge, mask=there)
    silent = tl.zeros([ROWS], tl.float32)
    total_size = tl.zeros([ROWS], tl.float32)
    clipped = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    if WHOLE:
        count, capped = counts_of(
            x, threshold[:, None], edge[:, None], cap, DEAD, counts_ptr.dtype.element_ty == tl.int8
        )
        _store_counts(counts_ptr, start + column, capped, inside)
        if statistics_ptr is not None:
            silent, total_size, clipped, largest = _statistics(count, capped, cap, BLOCK - width)
    else:
        for first in range(0, width, BLOCK):
            mask = there[:, None] & (first + column < width)
            x = tl.load(x_ptr + start + first + column, mask=mask, other=0.0).to(tl.float32)
            count, capped = counts_of(
                x, threshold[:, None], edge[:, None], cap, DEAD, counts_ptr.dtype.element_ty == tl.int8
            )
            _store_counts(counts_ptr, start + first + column, capped, mask)
            if statistics_ptr is not None:
                own_silent, own_size, own_clipped, own_largest = _statistics(
                    count, capped, cap, tl.maximum(first + BLOCK - width, 0)
                )
                silent += own_silent
                total_size += own_size
                clipped += own_clipped
                largest = tl.maximum(largest, own_largest)
    if statistics_ptr is not None:
        at = statistics_ptr + row.to(tl.int64) * 4
        tl.store(at, silent.to(tl.int64), mask=there)
        tl.store(at + 1, total_size.to(tl.int64), mask=there)
        tl.store(at + 2, clipped.to(tl.int64), mask=there)
        tl.store(at + 3, largest.to(tl.int64), mask=there)
