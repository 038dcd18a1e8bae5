"""Products that read only the rows of channels that fired: int8 or floating weights [in, out], few tokens.

A program owns a block of outputs and a part of the inputs (a group, or a piece of one). It loads the counts
of its part, ranks those that are not zero by a cumulative sum, and turns ranks into a list, ROWS entries at a
time; then it loads the listed rows alone. With up to BATCH tokens the list is the union of their channels.

Two stages, deterministic: parts are stored side by side, then added. Integer parts are exact; floating ones
are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.ahead import Compilation
from spikelm.kernels.triton_targets import target_of

BATCH = 4
"""Most tokens of one product; the channels of more are nearly all of them."""
UNROLL = 32
"""Partial sums of an output that the second stage loads at once."""
FLOAT_GROUP = 256
"""Inputs of a part where nothing but the split decides: floating weights."""


@triton.jit
def _event_sums(
    x,
    weight,
    sums,
    N,
    outs,
    D,
    group,
    pieces,
    stride_n,
    INTEGERS: tl.constexpr,
    TOKENS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sums [part, N, O] of x [N, D] times the rows of weight [D, O] whose x is not zero in every token."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.program_id(1)
    begin = part // pieces * group + part % pieces * PART
    last = min(D, (part // pieces + 1) * group)
    channel = begin + tl.arange(0, PART)
    n = tl.arange(0, TOKENS)
    kind = tl.int32 if INTEGERS else tl.float32
    value = tl.load(
        x + n.to(tl.int64)[:, None] * stride_n + channel[None, :],
        mask=(n < N)[:, None] & (channel < last)[None, :],
        other=0,
    ).to(kind)
    # NaN is not equal to zero, so its row is read and shows it.
    fired = tl.max((value != 0).to(tl.int32), 0)
    rank = tl.cumsum(fired, 0)
    number = tl.sum(fired, 0)
    total = tl.zeros((TOKENS, BLOCK_O), kind)
    for listed in range(0, number, ROWS):
        entry = listed + 1 + tl.arange(0, ROWS)
        chosen = (rank[None, :] == entry[:, None]) & (fired[None, :] != 0)
        row = tl.sum(tl.where(chosen, channel[None, :], 0), 1)
        rows = tl.load(
            weight + row.to(tl.int64)[:, None] * outs + o[None, :],
            mask=(entry <= number)[:, None] & (o < outs)[None, :],
            other=0,
        ).to(kind)
        if TOKENS == 1:
            factor = tl.sum(tl.where(chosen, value, tl.zeros_like(value)), 1)
            total += tl.sum(factor[:, None] * rows, 0)[None, :]
        else:
            at = x + n.to(tl.int64)[:, None] * stride_n + row[None, :]
            factor = tl.load(at, mask=(n < N)[:, None] & (entry <= number)[None, :], other=0).to(kind)
            total += tl.sum(factor[:, :, None] * rows[None, :, :], 1)
    into = sums + (part.to(tl.int64) * N + n[:, None]) * outs + o[None, :]
    tl.store(into, total, mask=(n < N)[:, None] & (o < outs)[None, :])


@triton.jit
def _finish(
    sums,
    scales,
    threshold,
    bias,
    start,
    y,
    N,
    outs,
    groups,
    pieces,
    HAS_THRESHOLD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    PIECES: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y [N, O] of integer parts: those of a group together, then groups in order."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(1)
    inside = o < outs
    piece = tl.arange(0, PIECES)
    acc = tl.zeros((BLOCK_O,), tl.float32)
    if HAS_START:
        acc += tl.load(start + n)
    for first in range(0, groups, UNROLL):
        # Unrolled, so that all these loads are under way together; what is masked adds a zero, which changes
        # nothing: no sum here is ever -0.
        for more in tl.static_range(UNROLL):
            j = first + more
            total = tl.zeros((BLOCK_O,), tl.int32)
            for begin in range(0, pieces, PIECES):
                part = j * pieces + begin + piece
                known = (j < groups) & (begin + piece < pieces)
                at = sums + (part.to(tl.int64)[:, None] * N + n) * outs + o[None, :]
                total += tl.sum(tl.load(at, mask=known[:, None] & inside[None, :], other=0), 0)
            scale = tl.load(scales + o.to(tl.int64) * groups + j, mask=inside & (j < groups), other=0.0)
            acc = acc + total.to(tl.float32) * scale
    if HAS_THRESHOLD:
        acc = acc * tl.load(threshold + n)
    if HAS_BIAS:
        acc = acc + tl.load(bias + o, mask=inside, other=0.0)
    tl.store(y + n.to(tl.int64) * outs + o, acc, mask=inside)


@triton.jit
def _add_parts(sums, y, N, outs, parts, PIECES: tl.constexpr, BLOCK_O: tl.constexpr):
    """y [N, O] of floating parts [parts, N, O], added in a fixed order."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(1)
    total = tl.zeros((BLOCK_O,), tl.float32)
    for begin in range(0, parts, PIECES):
        part = begin + tl.arange(0, PIECES)
        at = sums + (part.to(tl.int64)[:, None] * N + n) * outs + o[None, :]
        total += tl.sum(tl.load(at, mask=(part < parts)[:, None] & (o < outs)[None, :], other=0.0), 0)
    tl.store(y + n.to(tl.int64) * outs + o, total.to(y.dtype.element_ty), mask=o < outs)


def event_config(target: str, itemsize: int, tokens: int, group: int) -> dict[str, int]:
    """Inputs a part, listed rows at a time, outputs a block, by architecture and bytes of a weight.

    A row's block is 512 bytes (256 where several tokens need registers): whole lines of memory, and with 32
    rows 8 to 16 kB under way per program, several programs on each multiprocessor.
    """
    wide = (512 if tokens == 1 else 256) // itemsize
    part = max(
        16, min(256 if target.startswith("gfx") or itemsize > 1 else 128, triton.next_power_of_2(group))
    )
    return {"PART": part, "ROWS": 32, "BLOCK_O": wide, "num_warps": 4, "num_stages": 1}


def event_sums(x: Tensor, weight: Tensor, group: int) -> Tensor:
    """Parts [groups, pieces, N, O] of x [N, D] @ weight [D, O], int32 for int8 x and weight, else float32.

    Args:
        x: rows of adjacent elements, at most BATCH.
        weight: contiguous.
        group: inputs whose sums are kept apart.
    """
    tokens, width, outputs = x.shape[0], x.shape[1], weight.shape[1]
    integers = weight.dtype == torch.int8
    padded = triton.next_power_of_2(tokens)
    config = event_config(target_of(x.device), weight.element_size(), padded, group)
    groups, pieces = triton.cdiv(width, group), triton.cdiv(min(group, width), config["PART"])
    kind = torch.int32 if integers else torch.float32
    sums = torch.empty(groups, pieces, tokens, outputs, dtype=kind, device=x.device)
    _event_sums[(triton.cdiv(outputs, config["BLOCK_O"]), groups * pieces)](
        x,
        weight,
        sums,
        tokens,
        outputs,
        width,
        group,
        pieces,
        x.stride(0),
        INTEGERS=integers,
        TOKENS=padded,
        **config,
    )
    return sums


def finish(
    sums: Tensor,
    scales: Tensor,
    threshold: Tensor | None,
    bias: Tensor | None,
    start: Tensor | None,
    y: Tensor,
) -> None:
    """Second stage of integer parts [groups, pieces, N, O], written to y fp32 [N, O]."""
    groups, pieces, tokens, outputs = sums.shape
    together = min(triton.next_power_of_2(pieces), UNROLL)
    _finish[(triton.cdiv(outputs, 128), tokens)](
        sums,
        scales,
        threshold if threshold is not None else scales,
        bias if bias is not None else scales,
        start if start is not None else scales,
        y,
        tokens,
        outputs,
        groups,
        pieces,
        HAS_THRESHOLD=threshold is not None,
        HAS_BIAS=bias is not None,
        HAS_START=start is not None,
        PIECES=together,
        UNROLL=min(UNROLL // together, triton.next_power_of_2(groups)),
        BLOCK_O=128,
        num_warps=4,
        enable_fp_fusion=False,
    )


def add_parts(sums: Tensor, y: Tensor) -> None:
    """Second stage of floating parts [groups, pieces, N, O], written to y [N, O]."""
    groups, pieces, tokens, outputs = sums.shape
    parts = groups * pieces
    _add_parts[(triton.cdiv(outputs, 128), tokens)](
        sums,
        y,
        tokens,
        outputs,
        parts,
        PIECES=min(triton.next_power_of_2(parts), 64),
        BLOCK_O=128,
        num_warps=4,
    )


def compilations(target: str) -> list[Compilation]:
    """Both stages for one, two and four tokens, integers (groups and one scale per output) and floats."""
    found = []
    sizes = dict.fromkeys(("N", "outs", "D", "group", "pieces", "stride_n"), "i32")
    weights = {"i8": 1, "bf16": 2, "fp32": 4}
    for kind, itemsize in weights.items():
        for tokens in (1, 2, 4):
            for group in (32, 128, 4096) if kind == "i8" else (FLOAT_GROUP,):
                config = event_config(target, itemsize, tokens, group)
                warps, stages = config.pop("num_warps"), config.pop("num_stages")
                integers = kind == "i8"
                found.append(
                    Compilation(
                        kernel=_event_sums,
                        name=f"event_sums[{kind},N={tokens},group={group}]",
                        signature={
                            "x": f"*{kind}",
                            "weight": f"*{kind}",
                            "sums": "*i32" if integers else "*fp32",
                            **sizes,
                        },
                        constants={"INTEGERS": integers, "TOKENS": tokens, **config},
                        num_warps=warps,
                        num_stages=stages,
                        multiples=("outs", "D", "group", "stride_n"),
                    )
                )
    for pieces, groups in ((1, 32), (32, 1)):
        found.append(
            Compilation(
                kernel=_finish,
                name=f"event_finish[pieces={pieces},groups={groups}]",
                signature={
                    "sums": "*i32",
                    **dict.fromkeys(("scales", "threshold", "bias", "start", "y"), "*fp32"),
                    **dict.fromkeys(("N", "outs", "groups", "pieces"), "i32"),
                },
                constants={
                    **dict.fromkeys(("HAS_THRESHOLD", "HAS_BIAS", "HAS_START"), True),
                    "PIECES": pieces,
                    "UNROLL": UNROLL // pieces,
                    "BLOCK_O": 128,
                },
                options={"enable_fp_fusion": False},
                multiples=("outs",),
            )
        )
    for kind in ("fp32", "bf16"):
        found.append(
            Compilation(
                kernel=_add_parts,
                name=f"event_parts[{kind}]",
                signature={"sums": "*fp32", "y": f"*{kind}", "N": "i32", "outs": "i32", "parts": "i32"},
                constants={"PIECES": 16, "BLOCK_O": 128},
                multiples=("outs",),
            )
        )
    return found
