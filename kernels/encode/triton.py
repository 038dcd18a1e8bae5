"""Adaptive spike encoding in Triton: launches, torch ops with gradients, and the configurations shipped.

x is read in its own dtype (float32, bfloat16 or float16). A count may differ from the other forms' where the
last bit of the mean does and x / V lies that close to a half; the division itself is rounded as theirs is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.ahead import Compilation
from spikelm.kernels.encode.triton_backward import encode_backward_kernel
from spikelm.kernels.encode.triton_forward import encode_forward_kernel
from spikelm.kernels.triton_scan import TYPES, alignment

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # elements of a program, 32 per lane of four warps
WHOLE = 8192  # features up to which a row stays in registers


class Config(NamedTuple):
    """Rows and columns of a program's tile, whether a row fits, and warps."""

    rows: int
    block: int
    whole: bool
    num_warps: int


def config(width: int) -> Config:
    """Configuration for rows of so many features. It must not depend on anything else: see the sums."""
    if width > WHOLE:
        return Config(1, TILE, False, 8)
    block = max(16, triton.next_power_of_2(width))
    return Config(max(1, TILE // block), block, True, 8 if block > TILE else 4)


def check(x: Tensor) -> None:
    """Refuses a dtype that the Triton form lacks.

    Raises:
        KernelError: naming it.
    """
    if x.dtype not in DTYPES:
        raise KernelError(
            f"encode in Triton takes float32, bfloat16 and float16, not {x.dtype}; use auto or torch"
        )


def adaptive_encode(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Counts fp32 [.., D] and threshold fp32 [.., 1] of x [.., D]."""
    check(x)
    counts, threshold, _ = encode_triton_forward(x, k, dead_zone, cap, mean)
    return counts, threshold


def adaptive_encode_int8(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int8 [.., D], threshold fp32 [.., 1] and statistics int64 [.., 4] of x [.., D]; no gradient."""
    check(x)
    return encode_triton_int8(x, k, dead_zone, cap, mean)


def decode_counts(counts: Tensor, threshold: Tensor) -> Tensor:
    """N V in the threshold's dtype."""
    # torch multiplies integers by floats in one pass: a kernel of our own would gain nothing
    return torch.mul(counts, threshold.detach()).to(threshold.dtype)


def _forward(
    x: Tensor,
    k: float,
    dead_zone: float,
    cap: int,
    mean: Tensor | None,
    counts: Tensor,
    edge: Tensor | None,
    statistics: Tensor | None,
) -> Tensor:
    threshold = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    width, rows = x.shape[-1], threshold.numel()
    chosen = config(width)
    if rows:
        with torch.cuda.device_of(x):
            encode_forward_kernel[(-(-rows // chosen.rows),)](
                x.contiguous(),
                None if mean is None else mean.contiguous(),
                counts,
                threshold,
                edge,
                statistics,
                float(k),
                float(dead_zone),
                float(cap),
                rows,
                width,
                ROWS=chosen.rows,
                BLOCK=chosen.block,
                WHOLE=chosen.whole,
                DEAD=dead_zone != 0,
                ALIGN=alignment(width),
                num_warps=chosen.num_warps,
            )
    return threshold


@torch.library.custom_op("spikelm::encode_triton_forward", mutates_args=())
def encode_triton_forward(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts fp32 [.., D], threshold [.., 1] and the edge of the dead zone [.., 1]."""
    counts = x.new_empty(x.shape, dtype=torch.float32)
    edge = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return counts, _forward(x, k, dead_zone, cap, mean, counts, edge, None), edge


@encode_triton_forward.register_fake
def _(x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    row = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), row, torch.empty_like(row)


@torch.library.custom_op("spikelm::encode_triton_int8", mutates_args=())
def encode_triton_int8(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int8 [.., D], threshold [.., 1] and statistics int64 [.., 4]."""
    counts = x.new_empty(x.shape, dtype=torch.int8)
    statistics = x.new_empty((*x.shape[:-1], 4), dtype=torch.int64)
    return counts, _forward(x, k, dead_zone, cap, mean, counts, None, statistics), statistics


@encode_triton_int8.register_fake
def _(x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
        x.new_empty((*x.shape[:-1], 4), dtype=torch.int64),
    )


@torch.library.custom_op("spikelm::encode_triton_backward", mutates_args=())
def encode_triton_backward(
    grad_counts: Tensor, x: Tensor, threshold: Tensor, edge: Tensor, cap: int, dead: bool
) -> Tensor:
    """Gradient of x [.., D] in its dtype."""
    x, threshold, edge = x.contiguous(), threshold.contiguous(), edge.contiguous()
    grad_x = torch.empty_like(x)
    width, rows = x.shape[-1], threshold.numel()
    chosen = config(width)
    if grad_x.numel():
        with torch.cuda.device_of(x):
            encode_backward_kernel[(-(-rows // chosen.rows), -(-width // chosen.block))](
                grad_counts.contiguous(),
                x,
                threshold,
                edge,
                grad_x,
                float(cap),
                rows,
                width,
                ROWS=chosen.rows,
                BLOCK=chosen.block,
                DEAD=dead,
                ALIGN=alignment(width),
                num_warps=chosen.num_warps,
            )
    return grad_x


@encode_triton_backward.register_fake
def _(grad_counts: Tensor, x: Tensor, threshold: Tensor, edge: Tensor, cap: int, dead: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, dead_zone, ctx.cap, _ = inputs
    ctx.dead = dead_zone != 0
    _, threshold, edge = output
    ctx.save_for_backward(x, threshold, edge)
    ctx.mark_non_differentiable(threshold, edge)


def _backward(ctx: Any, grad_counts: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return encode_triton_backward(grad_counts, *ctx.saved_tensors, ctx.cap, ctx.dead), None, None, None, None


encode_triton_forward.register_autograd(_backward, setup_context=_setup)

# Argument -> type; "x" stands for the dtype of the activations.
_FORWARD = {
    "x_ptr": "x",
    "mean_ptr": "*fp32",
    "counts_ptr": "*fp32",
    "threshold_ptr": "*fp32",
    "edge_ptr": "*fp32",
    "statistics_ptr": "*i64",
    "k": "fp32",
    "dead_zone": "fp32",
    "cap": "fp32",
    "rows": "i32",
    "width": "i32",
}
_BACKWARD = {
    "grad_counts_ptr": "*fp32",
    "x_ptr": "x",
    "threshold_ptr": "*fp32",
    "edge_ptr": "*fp32",
    "grad_x_ptr": "x",
    "cap": "fp32",
    "rows": "i32",
    "width": "i32",
}


def compilations(target: str) -> list[Compilation]:
    """The shipped configurations: both dtypes, counts as floats and as int8, short and long rows."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 4096, 8192, 65536, 4095):
            chosen = config(width)
            constants = {"ROWS": chosen.rows, "BLOCK": chosen.block, "ALIGN": alignment(width)}
            constants["DEAD"] = width != 4096
            whole = {**constants, "WHOLE": chosen.whole}
            training = {**whole, "mean_ptr": None, "statistics_ptr": None}
            inference = {**whole, "mean_ptr": None, "edge_ptr": None}
            given = {**whole, "statistics_ptr": None}
            wanted = [
                (encode_forward_kernel, "training,", _FORWARD, training),
                (encode_forward_kernel, "int8,", {**_FORWARD, "counts_ptr": "*i8"}, inference),
                (encode_backward_kernel, "", _BACKWARD, constants),
            ]
            if width == 4096:
                wanted.append((encode_forward_kernel, "mean,", _FORWARD, given))
            for kernel, label, types, fixed in wanted:
                found.append(
                    Compilation(
                        kernel=kernel,
                        name=f"{kernel.__name__.removesuffix('_kernel')}[{label}D={width},{TYPES[dtype]}]",
                        signature={
                            name: f"*{TYPES[dtype]}" if kind == "x" else kind
                            for name, kind in types.items()
                            if name not in fixed
                        },
                        constants=fixed,
                        num_warps=chosen.num_warps,
                    )
                )
    return found
