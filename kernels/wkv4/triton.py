"""The wkv recurrence of RWKV-4 in Triton: launches, torch ops with gradients, and the configurations shipped.

k and v are read and y is written in their own dtypes (float32, bfloat16 or float16); states are float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.ahead import Compilation
from spikelm.kernels.triton_scan import GROUP, TYPES, alignment, pack_masks
from spikelm.kernels.wkv4.reference import EMPTY_MAX
from spikelm.kernels.wkv4.triton_backward import wkv4_backward_kernel, wkv4_carry_back_kernel
from spikelm.kernels.wkv4.triton_forward import (
    wkv4_carry_kernel,
    wkv4_decode_kernel,
    wkv4_forward_kernel,
    wkv4_summary_kernel,
)

CARRY_BLOCK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORTEST_CHUNK = 4  # groups: shorter chunks would be mostly carries


class Config(NamedTuple):
    """Channels of a program and groups of steps in flight, forward and backward. A program is one warp."""

    forward_block: int
    forward_stages: int
    backward_block: int
    backward_stages: int


def config(hip: bool, dtype: torch.dtype, align: int) -> Config:
    """Configuration for a device (ROCm or CUDA), the wider dtype of k and v, and the alignment of rows.

    One warp per program, as the most programs hide the most latency; on CUDA with 128 bytes of each row.
    Backward holds 16 states of (num, den, max) per channel in registers: one channel per lane. So does
    forward where rows of an odd number of half-precision elements rule asynchronous copies out.
    """
    if hip:
        return Config(64, 2, 64, 1)
    if dtype == torch.float32:
        return Config(32, 3, 32, 2)
    return Config(32, 1, 32, 1) if align == 1 else Config(64, 3, 32, 2)


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; of an H200 where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def choose_chunks(rows: int, steps: int, channels: int, block: int, processors: int) -> int:
    """Chunks of the sequence for which there is about one program per warp scheduler of the device.

    Cutting reads the inputs once more, so a sequence is cut only where rows and channels leave at least half
    of the schedulers idle.
    """
    programs = rows * -(-channels // block)
    return max(1, min(4 * processors // max(programs, 1), -(-steps // GROUP) // SHORTEST_CHUNK))


def wkv4(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    chunks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, C] in v's dtype and state fp32 [B, 3, C]; ``chunks`` cuts the sequence, 0 chooses.

    Raises:
        KernelError: a dtype that the Triton form lacks.
    """
    if k.dtype not in DTYPES or v.dtype not in DTYPES:
        raise KernelError(
            f"wkv4 in Triton takes float32, bfloat16 and float16, not k {k.dtype} and v {v.dtype}; "
            "use auto or torch"
        )
    inputs = (decay.float(), bonus.float(), k, v, state.float())
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, last, _ = wkv4_triton_forward(*inputs, reset, valid, chunks, save)
    return y, last


def _cut(k: Tensor, v: Tensor, chunks: int) -> tuple[Config, int, int]:
    """Configuration, groups of a chunk, and chunks."""
    rows, steps, channels = k.shape
    wider = torch.float32 if torch.float32 in (k.dtype, v.dtype) else k.dtype
    chosen = config(torch.version.hip is not None, wider, alignment(channels))
    groups = -(-steps // GROUP)
    chunks = chunks or choose_chunks(rows, steps, channels, chosen.forward_block, _processors(k.device))
    chunk = max(1, -(-groups // chunks))
    return chosen, chunk, max(1, -(-groups // chunk))


@torch.library.custom_op("spikelm::wkv4_triton_forward", mutates_args=())
def wkv4_triton_forward(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    chunks: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, C], state [B, 3, C] and checkpoints [B, ceil(T / GROUP), 3, C] ([0] without save)."""
    decay, bonus, k, v, state = (x.contiguous() for x in (decay, bonus, k, v, state))
    rows, steps, channels = k.shape
    y, last = torch.empty_like(v), torch.empty_like(state)
    checkpoints = state.new_empty((rows, -(-steps // GROUP), 3, channels) if save else (0,))
    if not state.numel():
        return y, last, checkpoints
    chosen, chunk, chunks = _cut(k, v, chunks)
    sizes = (steps, chunk, channels)
    blocks = -(-channels // chosen.forward_block)
    constants = {
        "EMPTY_MAX": EMPTY_MAX,
        "BLOCK": chosen.forward_block,
        "GROUP": GROUP,
        "ALIGN": alignment(channels),
    }
    constants.update(STAGES=chosen.forward_stages, num_warps=1)
    with torch.cuda.device_of(k):
        words, carry = pack_masks(reset, valid), state
        if chunks > 1:
            carry = state.new_empty(rows, chunks, 3, channels)
            passed = torch.empty(rows, chunks, dtype=torch.int32, device=k.device)
            wkv4_summary_kernel[(blocks, chunks - 1, rows)](
                decay, k, v, words, carry, passed, *sizes, **constants
            )
            wkv4_carry_kernel[(-(-channels // CARRY_BLOCK), rows)](
                decay, state, carry, passed, chunks, channels, BLOCK=CARRY_BLOCK, num_warps=4
            )
        wkv4_forward_kernel[(blocks, chunks, rows)](
            decay,
            bonus,
            k,
            v,
            carry,
            words,
            y,
            last,
            checkpoints if save else None,
            *sizes,
            EVEN=steps % GROUP == 0,
            **constants,
        )
    return y, last, checkpoints


@wkv4_triton_forward.register_fake
def _(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    chunks: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps, channels = k.shape
    shape = (rows, (steps + GROUP - 1) // GROUP, 3, channels) if save else (0,)
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(shape)


@torch.library.custom_op("spikelm::wkv4_triton_backward", mutates_args=())
def wkv4_triton_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    last: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of decay [C], bonus [C], k and v [B, T, C] and the incoming state [B, 3, C] (0 for max)."""
    grad_y, grad_last, last = grad_y.contiguous(), grad_last.contiguous(), last.contiguous()
    decay, bonus, k, v, checkpoints = (x.contiguous() for x in (decay, bonus, k, v, checkpoints))
    rows, steps, channels = k.shape
    grad_k, grad_v, grad_state = torch.empty_like(k), torch.empty_like(v), torch.empty_like(grad_last)
    if not grad_state.numel():
        return torch.zeros_like(decay), torch.zeros_like(bonus), grad_k, grad_v, grad_state
    chosen, chunk, chunks = _cut(k, v, chunks)
    sizes = (steps, chunk, channels)
    blocks = -(-channels // chosen.backward_block)
    constants = {
        "EMPTY_MAX": EMPTY_MAX,
        "BLOCK": chosen.backward_block,
        "GROUP": GROUP,
        "ALIGN": alignment(channels),
    }
    constants.update(STAGES=chosen.backward_stages, num_warps=1, EVEN=steps % GROUP == 0)
    decay_rows, bonus_rows = last.new_empty(2, rows * chunks, channels)
    with torch.cuda.device_of(k):
        words = pack_masks(reset, valid)
        given = (decay, bonus, k, v, words, checkpoints)
        if chunks > 1:
            carry = last.new_empty(rows, chunks, 2, channels)
            wkv4_backward_kernel[(blocks, chunks - 1, rows)](
                grad_y, carry, *given, *[None] * 5, *sizes, SUMMARY=True, **constants
            )
            wkv4_carry_back_kernel[(-(-channels // CARRY_BLOCK), rows)](
                grad_last,
                last,
                decay,
                words,
                checkpoints,
                carry,
                steps,
                chunk,
                chunks,
                channels,
                BLOCK=CARRY_BLOCK,
                GROUP=GROUP,
                num_warps=4,
            )
        else:
            carry = grad_last[:, :2].contiguous()
        wanted = (grad_k, grad_v, grad_state, decay_rows, bonus_rows)
        wkv4_backward_kernel[(blocks, chunks, rows)](
            grad_y, carry, *given, *wanted, *sizes, SUMMARY=False, **constants
        )
    return decay_rows.sum(0), bonus_rows.sum(0), grad_k, grad_v, grad_state


@wkv4_triton_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    last: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        decay.new_empty(decay.shape),
        bonus.new_empty(bonus.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        grad_last.new_empty(grad_last.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    decay, bonus, k, v, _, reset, valid, chunks, save = inputs
    if not save:
        raise KernelError("wkv4_triton_forward was called without save, and now a gradient is asked for")
    ctx.save_for_backward(decay, bonus, k, v, output[1], output[2], reset, valid)
    ctx.mark_non_differentiable(output[2])
    ctx.chunks = chunks


def _backward(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = wkv4_triton_backward(grad_y, grad_last, *ctx.saved_tensors, ctx.chunks)
    return (*grads, None, None, None, None)


wkv4_triton_forward.register_autograd(_backward, setup_context=_setup)


def wkv4_decode(decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
    """Output [B, C] of one token; updates pool fp32 [S, 3, C] in place at the rows' slots [B]."""
    decay, bonus = decay.float().contiguous(), bonus.float().contiguous()
    k, v, slots = k.contiguous(), v.contiguous(), slots.contiguous()
    rows, channels = k.shape
    y = torch.empty_like(v)
    if y.numel():
        with torch.cuda.device_of(k):
            wkv4_decode_kernel[(-(-channels // CARRY_BLOCK), rows)](
                decay, bonus, k, v, pool, slots, y, channels, BLOCK=CARRY_BLOCK, num_warps=2
            )
    return y


# Argument -> type; "x" stands for the dtype of k and v.
_FLOATS = ("decay_ptr", "bonus_ptr", "carry_ptr", "last_ptr", "checkpoints_ptr", "summary_ptr", "state_ptr")
_FLOATS += ("grad_state_ptr", "decay_rows_ptr", "bonus_rows_ptr", "grad_last_ptr", "pool_ptr")
_TYPES = {
    **dict.fromkeys(_FLOATS, "*fp32"),
    **dict.fromkeys(("k_ptr", "v_ptr", "y_ptr", "grad_y_ptr", "grad_k_ptr", "grad_v_ptr"), "x"),
    **dict.fromkeys(("words_ptr", "passed_ptr"), "*i32"),
    "slots_ptr": "*i64",
    **dict.fromkeys(("steps", "chunk", "chunks", "channels"), "i32"),
}
_UNUSED = ("grad_k_ptr", "grad_v_ptr", "grad_state_ptr", "decay_rows_ptr", "bonus_rows_ptr")


def compilations(target: str) -> list[Compilation]:
    """The shipped configurations: both dtypes, without and with masks, in one piece and in chunks."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for masked, align in ((False, 16), (True, 16), (False, 1)):
            chosen = config(target.startswith("gfx"), dtype, align)
            label = f"{'masks,' * masked}align={align},{TYPES[dtype]}"
            missing = {} if masked else {"words_ptr": None}
            shared = {"EMPTY_MAX": EMPTY_MAX, "GROUP": GROUP, "ALIGN": align, **missing}
            forward = {**shared, "BLOCK": chosen.forward_block, "STAGES": chosen.forward_stages}
            backward = {**shared, "BLOCK": chosen.backward_block, "STAGES": chosen.backward_stages}
            backward.update(EVEN=align == 16, SUMMARY=False)
            wanted = [
                (wkv4_forward_kernel, "", {**forward, "EVEN": align == 16}, 1),
                (wkv4_backward_kernel, "", backward, 1),
            ]
            if align == 16:
                summary = {**backward, "SUMMARY": True, **dict.fromkeys(_UNUSED)}
                wanted += [
                    (wkv4_summary_kernel, "", forward, 1),
                    (wkv4_backward_kernel, "summary,", summary, 1),
                ]
                if dtype == torch.float32:
                    carry_back = {**missing, "BLOCK": CARRY_BLOCK, "GROUP": GROUP}
                    wanted.append((wkv4_carry_back_kernel, "", carry_back, 4))
            found += [_compilation(*each, dtype, label) for each in wanted]
        found.append(_compilation(wkv4_decode_kernel, "", {"BLOCK": CARRY_BLOCK}, 2, dtype, TYPES[dtype]))
    found.append(_compilation(wkv4_carry_kernel, "", {"BLOCK": CARRY_BLOCK}, 4, torch.float32, "fp32"))
    return found


def _compilation(
    kernel: Any, prefix: str, constants: dict[str, Any], num_warps: int, dtype: torch.dtype, label: str
) -> Compilation:
    pointers = {name: f"*{TYPES[dtype]}" if kind == "x" else kind for name, kind in _TYPES.items()}
    return Compilation(
        kernel=kernel,
        name=f"{kernel.__name__.removesuffix('_kernel')}[{prefix}{label}]",
        signature={name: pointers[name] for name in kernel.arg_names if name not in constants},
        constants=constants,
        num_warps=num_warps,
    )
