"""Backward Triton kernel of adaptive spike encoding: straight through, the cap's mask recomputed from x."""

from __future__ import annotations

import triton
import triton.language as tl

from spikelm.kernels.encode.triton_common import counts_of


@triton.jit(do_not_specialize=["rows", "width"])
def encode_backward_kernel(
    grad_counts_ptr,  # [N, D]
    x_ptr,  # [N, D]
    threshold_ptr,  # fp32 [N]
    edge_ptr,  # fp32 [N]
    grad_x_ptr,  # [N, D]
    cap,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEAD: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """grad_counts / threshold, 0 where the cap cut a count."""
    width = width // ALIGN * ALIGN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    threshold = tl.load(threshold_ptr + row, mask=there, other=1.0)[:, None]
    edge = tl.load(edge_ptr + row, mask=there, other=0.0)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = there[:, None] & (column < width)
    at = (row.to(tl.int64) * width)[:, None] + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_counts_ptr + at, mask=inside, other=0.0).to(tl.float32)
    count, _ = counts_of(x, threshold, edge, cap, DEAD, False)
    grad_x = tl.where(tl.abs(count) > cap, 0.0, grad * tl.div_rn(1.0, threshold))
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
