"""Norm, token shift and encode in Triton: kernel, torch op, and the configurations shipped.

A program owns one token: it normalises the token and the one before it (that row comes from the cache) and
encodes every projection's mixture from registers. So the residual is read once and only counts are written.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.ahead import Compilation
from spikelm.kernels.encode.triton_common import as_int8, counts_of, threshold_of
from spikelm.kernels.shift_encode.options import Norm, Options
from spikelm.kernels.triton_scan import TYPES, alignment
from spikelm.kernels.triton_targets import target_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = {"sm_80": 8192, "sm_90": 8192, "sm_100": 4096, "gfx942": 8192}
"""Features that fit the registers of a program."""


@triton.jit
def _normalised(x, weight, bias, width, eps, inside, CENTRED: tl.constexpr):
    """Layer norm (CENTRED) or RMS norm of one row."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    return x * scale * weight + bias


@triton.jit(do_not_specialize=["steps", "width"])
def shift_encode_kernel(
    x_ptr,  # [B, T, D]
    weight_ptr,  # fp32 [D]
    bias_ptr,  # fp32 [D] or None
    last_ptr,  # fp32 [B, D]
    mixes_ptr,  # fp32 [M, D]
    options_ptr,  # fp32 [3, M]: k, dead zone, cap
    source_ptr,  # int32 [B, T + 1], the token before: 0 is last, j + 1 is token j, -1 is none; None: the last
    valid_ptr,  # uint8 [B, T] or None
    counts_ptr,  # int8 [M, B, T, D]
    thresholds_ptr,  # fp32 [M, B, T]
    new_last_ptr,  # fp32 [B, D]
    statistics_ptr,  # int64 [M, B, T, 4]
    steps,
    width,
    eps,
    MIXES: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Counts of all projections of one token, or the new last."""
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    stride = tl.cast(width, tl.int64)
    t = tl.program_id(0)  # the program of step T only writes the new last
    row = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    source = t
    if source_ptr is not None:
        source = tl.load(source_ptr + row * (steps + 1) + t)
    sample = width.to(tl.float32)
    at = row * steps
    before = tl.load(x_ptr + (at + source - 1) * stride + column, mask=inside & (source > 0), other=0.0)
    before = _normalised(before.to(tl.float32), weight, bias, sample, eps, inside, CENTRED)
    first = tl.load(last_ptr + row * stride + column, mask=inside & (source == 0), other=0.0)
    before = tl.where(source > 0, before, first)
    if t == steps:
        tl.store(new_last_ptr + row * stride + column, before, mask=inside)
    else:
        token = tl.load(x_ptr + (at + t) * stride + column, mask=inside, other=0.0).to(tl.float32)
        token = _normalised(token, weight, bias, sample, eps, inside, CENTRED)
        here = True
        if valid_ptr is not None:
            here = tl.load(valid_ptr + at + t) != 0
        for m in tl.static_range(MIXES):
            k = tl.load(options_ptr + m)
            dead_zone = tl.load(options_ptr + MIXES + m)
            cap = tl.load(options_ptr + 2 * MIXES + m)
            mix = tl.load(mixes_ptr + m * stride + column, mask=inside, other=0.0)
            mixed = before + mix * (token - before)
            mixed = tl.where(inside & here, mixed, 0.0)
            mean = tl.div_rn(tl.sum(tl.abs(mixed), 0), sample)
            threshold = threshold_of(mean, k)
            edge = dead_zone * mean
            count, capped = counts_of(mixed[None, :], threshold, edge, cap, True, True)
            count, capped = tl.reshape(count, [BLOCK]), tl.reshape(capped, [BLOCK])
            whole = as_int8(capped)
            place = m * rows * steps + at + t
            tl.store(counts_ptr + place * stride + column, whole, mask=inside)
            tl.store(thresholds_ptr + place, threshold)
            size = tl.where(inside, tl.abs(whole.to(tl.int32)), 0)
            counted = inside & here
            silent = tl.sum((counted & (size == 0)).to(tl.int32), 0)
            clipped = tl.sum((counted & (tl.abs(count) > cap)).to(tl.int32), 0)
            tl.store(statistics_ptr + place * 4, silent.to(tl.int64))
            tl.store(statistics_ptr + place * 4 + 1, tl.sum(size, 0).to(tl.int64))
            tl.store(statistics_ptr + place * 4 + 2, clipped.to(tl.int64))
            tl.store(statistics_ptr + place * 4 + 3, tl.max(size, 0).to(tl.int64))


def check(x: Tensor) -> str | None:
    """Why the Triton form cannot take x, or None."""
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {x.dtype}"
    widest = WIDEST[target_of(x.device)]
    if x.shape[-1] > widest:
        return f"takes up to {widest} features, not {x.shape[-1]}"
    return None


def shift_encode(
    x: Tensor,
    norm: Norm,
    last: Tensor,
    mixes: Tensor,
    options: Options,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts [M, B, T, D], thresholds [M, B, T, 1], last [B, D], statistics [M, B, T, 4] of x [B, T, D].

    Raises:
        KernelError: a dtype or width that the Triton form lacks.
    """
    problem = check(x)
    if problem is not None:
        raise KernelError(f"shift_encode in Triton {problem}; use auto or torch")
    bias = None if norm.bias is None else norm.bias.float()
    numbers = [*options.k, *options.dead_zone, *map(float, options.cap)]
    centred = norm.kind == "layernorm"
    return shift_encode_triton(
        x, norm.weight.float(), bias, norm.eps, centred, last.float(), mixes.float(), numbers, reset, valid
    )


@cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """A few constants on a device; kept, because a copy to a GPU would stop its queue in every call."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _sources(reset: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The token before each one and before the end [B, T + 1], as the kernel reads it; None: the last one."""
    mask = reset if reset is not None else valid
    if mask is None:
        return None
    batch, steps = mask.shape
    if not steps:
        return None
    column = torch.arange(1, steps + 1, dtype=torch.int32, device=mask.device)
    seen = column.expand(batch, -1) if valid is None else torch.where(valid, column, 0).cummax(1).values
    source = torch.cat([seen.new_zeros(batch, 1), seen], 1)
    if reset is not None:
        wiped = torch.where(reset, column, 0).cummax(1).values
        wiped = torch.cat([wiped, wiped[:, -1:]], 1)
        source = source.masked_fill(source < wiped, -1)
    return source.contiguous()


@torch.library.custom_op("spikelm::shift_encode_triton", mutates_args=())
def shift_encode_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    last: Tensor,
    mixes: Tensor,
    options: list[float],
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`shift_encode`; ``options`` are k, dead zone and cap of every projection."""
    (batch, steps, width), count = x.shape, mixes.shape[0]
    counts = x.new_empty((count, batch, steps, width), dtype=torch.int8)
    thresholds = x.new_empty((count, batch, steps, 1), dtype=torch.float32)
    statistics = x.new_empty((count, batch, steps, 4), dtype=torch.int64)
    new_last = torch.empty_like(last, memory_format=torch.contiguous_format)
    if batch and width:
        block = triton.next_power_of_2(width)
        with torch.cuda.device_of(x):
            shift_encode_kernel[(steps + 1, batch)](
                x.contiguous(),
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                last.contiguous(),
                mixes.contiguous(),
                _on_device(tuple(options), x.device),
                _sources(reset, valid),
                None if valid is None else valid.contiguous().view(torch.uint8),
                counts,
                thresholds,
                new_last,
                statistics,
                steps,
                width,
                eps,
                MIXES=count,
                CENTRED=centred,
                BLOCK=block,
                ALIGN=alignment(width),
                num_warps=warps(block),
            )
    return counts, thresholds, new_last, statistics


def warps(block: int) -> int:
    """Warps of a program: 16 features per lane."""
    return max(1, block // 512)


@shift_encode_triton.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    last: Tensor,
    mixes: Tensor,
    options: list[float],
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, steps, width), count = x.shape, mixes.shape[0]
    return (
        x.new_empty((count, batch, steps, width), dtype=torch.int8),
        x.new_empty((count, batch, steps, 1), dtype=torch.float32),
        last.new_empty(last.shape),
        x.new_empty((count, batch, steps, 4), dtype=torch.int64),
    )


_TYPES = {
    "x_ptr": "x",
    **dict.fromkeys(("weight_ptr", "bias_ptr", "last_ptr", "mixes_ptr", "options_ptr"), "*fp32"),
    "source_ptr": "*i32",
    "valid_ptr": "*u8",
    "counts_ptr": "*i8",
    **dict.fromkeys(("thresholds_ptr", "new_last_ptr"), "*fp32"),
    "statistics_ptr": "*i64",
    "steps": "i32",
    "width": "i32",
    "eps": "fp32",
}


def compilations(target: str) -> list[Compilation]:
    """The shipped configurations: both dtypes and norms, with and without masks, narrow and widest rows."""
    found = []
    cases: tuple[tuple[int, bool, int, dict[str, Any]], ...] = (
        (768, True, 3, {"source_ptr": None, "valid_ptr": None}),
        (4096, False, 3, {"source_ptr": None, "valid_ptr": None, "bias_ptr": None}),
        (4096, True, 2, {}),
        (8192, True, 3, {"source_ptr": None, "valid_ptr": None}),
        (1001, False, 1, {"bias_ptr": None}),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for width, centred, mixes, missing in cases:
            if width > WIDEST[target]:
                continue
            block = triton.next_power_of_2(width)
            constants = {"MIXES": mixes, "CENTRED": centred, "BLOCK": block, "ALIGN": alignment(width)}
            constants.update(missing)
            kind = ("layernorm" if centred else "rmsnorm") + ("" if "source_ptr" in missing else ",masks")
            found.append(
                Compilation(
                    kernel=shift_encode_kernel,
                    name=f"shift_encode[{kind},M={mixes},D={width},{TYPES[dtype]}]",
                    signature={
                        name: f"*{TYPES[dtype]}" if type_ == "x" else type_
                        for name, type_ in _TYPES.items()
                        if name not in constants
                    },
                    constants=constants,
                    num_warps=warps(block),
                )
            )
    return found
