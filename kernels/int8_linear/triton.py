"""Integer counts times int8 weights on GPUs: tensor cores for batches, fired rows alone for few tokens.

Bit for bit the reference: the sums of a group are int32 and exact, so how they are split and in which order
they are added does not matter; what is rounded (scale, threshold, bias) is done group after group, with a
multiplication and an addition that must stay two operations. Triton and ptxas would contract them into one,
which rounds differently; every launch here that scales says ``enable_fp_fusion=False``.

The memory layout of ``weight`` [O, D] chooses the form: rows of outputs ([O, D] contiguous) are read whole by
the matrix product; rows of inputs (``in_out(weight)``, a transposed view of [D, O]) let up to BATCH tokens
read only the rows of channels that fired (triton_events.py), and larger batches use the matrix product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.ahead import Compilation
from spikelm.kernels.int8_linear.triton_events import BATCH, event_sums, finish
from spikelm.kernels.triton_targets import target_of

LARGEST = 127


@triton.jit
def _gemm(
    counts,
    weight,
    scales,
    threshold,
    bias,
    start,
    y,
    N,
    outs,
    D,
    group,
    groups,
    stride_n,
    stride_o,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """y [N, O] = threshold * sum_j scales[:, j] * (counts_j weight_j^T) + bias; one tile a program."""
    # Neighbouring programs share rows of counts and of weights, so that both come from the L2 cache.
    pid = tl.program_id(0)
    tiles_n, tiles_o = tl.cdiv(N, BLOCK_N), tl.cdiv(outs, BLOCK_O)
    width = SWIZZLE * tiles_o
    first = pid // width * SWIZZLE
    height = min(tiles_n - first, SWIZZLE)
    n = (first + pid % width % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = pid % width // height * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.arange(0, BLOCK_D)
    in_n, in_o = n < N, o < outs
    rows = counts + n.to(tl.int64)[:, None] * stride_n
    columns = weight + o.to(tl.int64)[None, :] * stride_o
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    if HAS_START:
        acc += tl.load(start + n, mask=in_n, other=0.0)[:, None]
    for j in range(0, groups):
        sums = tl.zeros((BLOCK_N, BLOCK_O), tl.int32)
        if ONE:
            at = j * BLOCK_D + d
            if EVEN:
                a = tl.load(rows + at[None, :], mask=in_n[:, None], other=0)
                b = tl.load(columns + at.to(tl.int64)[:, None] * stride_d, mask=in_o[None, :], other=0)
            else:
                inside = at < D
                a = tl.load(rows + at[None, :], mask=in_n[:, None] & inside[None, :], other=0)
                b = tl.load(
                    columns + at.to(tl.int64)[:, None] * stride_d,
                    mask=in_o[None, :] & inside[:, None],
                    other=0,
                )
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        else:
            last = min(D, (j + 1) * group)
            for begin in range(j * group, last, BLOCK_D):
                at = begin + d
                if EVEN:
                    a = tl.load(rows + at[None, :], mask=in_n[:, None], other=0)
                    b = tl.load(columns + at.to(tl.int64)[:, None] * stride_d, mask=in_o[None, :], other=0)
                else:
                    inside = at < last
                    a = tl.load(rows + at[None, :], mask=in_n[:, None] & inside[None, :], other=0)
                    b = tl.load(
                        columns + at.to(tl.int64)[:, None] * stride_d,
                        mask=in_o[None, :] & inside[:, None],
                        other=0,
                    )
                sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        scale = tl.load(scales + o.to(tl.int64) * groups + j, mask=in_o, other=0.0)
        acc = acc + sums.to(tl.float32) * scale[None, :]
    if HAS_THRESHOLD:
        acc = acc * tl.load(threshold + n, mask=in_n, other=0.0)[:, None]
    if HAS_BIAS:
        acc = acc + tl.load(bias + o, mask=in_o, other=0.0)[None, :]
    tl.store(y + n.to(tl.int64)[:, None] * outs + o[None, :], acc, mask=in_n[:, None] & in_o[None, :])


@triton.jit
def _as_int8(x, counts, start, D, stride_n, stride_d, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of counts in another dtype as int8, cut off at 127; start is NaN where a row holds no number."""
    n = tl.program_id(0).to(tl.int64)
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        value = tl.load(x + n * stride_n + d.to(tl.int64) * stride_d, mask=d < D, other=0).to(tl.float32)
        known = value == value
        bad = bad | tl.where(known, 0, 1)
        value = tl.minimum(tl.maximum(tl.where(known, value, 0.0), -LARGEST), LARGEST)
        tl.store(counts + n * D + d, value.to(tl.int8), mask=d < D)
    tl.store(start + n, tl.where(tl.max(bad, 0) > 0, float("nan"), 0.0))


def gemm_config(target: str, rows: int, group: int, aligned: bool) -> dict[str, int]:
    """Tile, warps and stages by architecture, number of tokens and inputs that share a scale.

    ``aligned``: rows and groups begin at multiples of 16 bytes. Other ones are loaded byte by byte, with a
    pointer for each, and want small tiles.
    """
    if not aligned:
        return {"BLOCK_N": 16, "BLOCK_O": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2}
    deep = 128 if group >= 128 else max(32, triton.next_power_of_2(group))
    if target.startswith("gfx"):
        shapes = {16: (16, 32, 4, 2), 64: (64, 64, 4, 2)}.get(_class(rows), (128, 128, 8, 2))
    else:
        # Few tokens: narrow tiles, so that every multiprocessor has one, and many bytes in flight.
        shapes = {16: (16, 32, 4, 6), 64: (64, 64, 4, 4)}.get(_class(rows), (128, 128, 8, 3))
    n, o, warps, stages = shapes
    return {"BLOCK_N": n, "BLOCK_O": o, "BLOCK_D": deep, "num_warps": warps, "num_stages": stages}


def _class(rows: int) -> int:
    """Shape class of a number of tokens: 16, 64 or 128 (and more)."""
    return 16 if rows <= 16 else 64 if rows <= 64 else 128


@torch.library.custom_op("spikelm::int8_linear_triton", mutates_args=())
def product(
    counts: Tensor, weight: Tensor, scales: Tensor, group: int, threshold: Tensor | None, bias: Tensor | None
) -> Tensor:
    """counts [N, D], weight int8 [O, D] of either layout, scales fp32 [O, groups] -> fp32 [N, O]."""
    rows, width, outputs = counts.shape[0], counts.shape[1], weight.shape[0]
    groups = scales.shape[1]
    y = torch.empty(rows, outputs, dtype=torch.float32, device=counts.device)
    if y.numel() == 0:
        return y
    counts, start = _int8(counts)
    scales = scales.contiguous()
    threshold = None if threshold is None else threshold.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if rows <= BATCH and groups > 0 and weight.stride(0) == 1 and outputs > 1:
        stored = weight.t() if weight.t().is_contiguous() else weight.t().contiguous()
        sums = event_sums(counts, stored, group)
        finish(sums, scales, threshold, bias, start, y)
        return y
    steps = (width, min(group, width), counts.stride(0), max(weight.stride()))
    aligned = all(step % 16 == 0 for step in steps)
    config = gemm_config(target_of(counts.device), rows, group, aligned)
    deep = config["BLOCK_D"]
    grid = (triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(outputs, config["BLOCK_O"]),)
    _gemm[grid](
        counts,
        weight,
        scales,
        threshold if threshold is not None else scales,
        bias if bias is not None else scales,
        start if start is not None else scales,
        y,
        rows,
        outputs,
        width,
        group,
        groups,
        counts.stride(0),
        weight.stride(0),
        weight.stride(1),
        ONE=group == deep,
        EVEN=group % deep == 0 and width % group == 0,
        HAS_THRESHOLD=threshold is not None,
        HAS_BIAS=bias is not None,
        HAS_START=start is not None,
        SWIZZLE=8,
        enable_fp_fusion=False,
        **config,
    )
    return y


@product.register_fake
def _(
    counts: Tensor, weight: Tensor, scales: Tensor, group: int, threshold: Tensor | None, bias: Tensor | None
) -> Tensor:
    return counts.new_empty(counts.shape[0], weight.shape[0], dtype=torch.float32)


def _int8(counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Int8 counts with rows of adjacent elements, and what the sums start from (None: zero)."""
    if counts.dtype == torch.int8:
        return (counts if counts.stride(1) == 1 else counts.contiguous()), None
    if counts.dtype == torch.float64:
        counts = counts.float()  # whole numbers up to 127 lose nothing
    rows, width = counts.shape
    whole = torch.empty(rows, width, dtype=torch.int8, device=counts.device)
    start = torch.empty(rows, dtype=torch.float32, device=counts.device)
    _as_int8[(rows,)](
        counts,
        whole,
        start,
        width,
        counts.stride(0),
        counts.stride(1),
        LARGEST=LARGEST,
        BLOCK=1024,
        num_warps=4,
    )
    return whole, start


def _shipped(
    target: str, rows: int, layout: str, name: str, group: int, even: bool, aligned: bool
) -> Compilation:
    """One configuration of the matrix product."""
    config = gemm_config(target, rows, group, aligned)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    one, free = ("stride_d", "stride_o") if layout == "out_in" else ("stride_o", "stride_d")
    return Compilation(
        kernel=_gemm,
        name=f"int8_linear[N={rows},{layout},{name}]",
        signature={
            **dict.fromkeys(("counts", "weight"), "*i8"),
            **dict.fromkeys(("scales", "threshold", "bias", "start", "y"), "*fp32"),
            **dict.fromkeys(("N", "outs", "D", "group", "groups", "stride_n", free), "i32"),
        },
        constants={
            **config,
            **dict.fromkeys(("HAS_THRESHOLD", "HAS_BIAS", "HAS_START"), True),
            one: 1,
            "ONE": group == config["BLOCK_D"],
            "EVEN": even,
            "SWIZZLE": 8,
        },
        num_warps=warps,
        num_stages=stages,
        options={"enable_fp_fusion": False},
        multiples=("outs", "D", "group", "stride_n", free) if aligned else (),
    )


def compilations(target: str) -> list[Compilation]:
    """Every shape class in both layouts: groups of 128, one scale per output, a cut group, odd sizes."""
    found = []
    for rows in (16, 64, 128):
        for layout in ("out_in", "in_out"):
            for name, group, even in (
                ("group=128", 128, True),
                ("per output", 4096, True),
                ("cut", 128, False),
            ):
                found.append(_shipped(target, rows, layout, name, group, even, True))
    for layout in ("out_in", "in_out"):
        found.append(_shipped(target, 16, layout, "odd", 300, False, False))
    for kind in ("fp32", "bf16"):
        found.append(
            Compilation(
                kernel=_as_int8,
                name=f"int8_linear_counts[{kind}]",
                signature={"x": f"*{kind}", "counts": "*i8", "start": "*fp32", "D": "i32", "stride_n": "i32"},
                constants={"stride_d": 1, "LARGEST": LARGEST, "BLOCK": 1024},
                multiples=("D", "stride_n"),
            )
        )
    return found
