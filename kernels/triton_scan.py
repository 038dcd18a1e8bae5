"""What the Triton kernels that scan over time share: how they read groups of steps and masks.

A program owns a block of channels and walks over groups of GROUP steps. A group is loaded as one tile
[GROUP, BLOCK] (wide asynchronous copies, issued groups ahead by the pipeliner) and taken apart into rows that
lie in registers.

The two masks become one 32-bit word per group: bit i says that the state is reset before step i, bit 16 + i
that the step is valid. Steps past the end of the sequence are not valid.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.ahead import Compilation

GROUP = 16
"""Steps of one tile and word; also the steps between two checkpoints."""
WORDS = 64  # of one program
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8"}
"""Triton's names of the element types."""


@triton.jit
def rows_of(tile, BLOCK: tl.constexpr):
    """The 16 rows of a tile [16, BLOCK]. The splits move nothing: a channel's rows lie in one lane."""
    t = tl.permute(tl.reshape(tile, [2, 2, 2, 2, BLOCK]), [4, 0, 1, 2, 3])
    a, b = tl.split(t)
    aa, ab = tl.split(a)
    ba, bb = tl.split(b)
    aaa, aab = tl.split(aa)
    aba, abb = tl.split(ab)
    baa, bab = tl.split(ba)
    bba, bbb = tl.split(bb)
    r0, r8 = tl.split(aaa)
    r4, r12 = tl.split(aab)
    r2, r10 = tl.split(aba)
    r6, r14 = tl.split(abb)
    r1, r9 = tl.split(baa)
    r5, r13 = tl.split(bab)
    r3, r11 = tl.split(bba)
    r7, r15 = tl.split(bbb)
    return (r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15)


@triton.jit(do_not_specialize=["steps", "words"])
def pack_masks_kernel(
    reset_ptr,  # uint8 [B, T] or None
    valid_ptr,  # uint8 [B, T] or None
    words_ptr,  # int32 [B, words]
    steps,
    words,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words of one sequence."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, GROUP)[None, :]
    t = word[:, None] * GROUP + bit
    there = t < steps
    weight = (tl.zeros_like(t) + 1) << bit
    packed = tl.zeros([WORDS], tl.int32)
    if reset_ptr is not None:
        fresh = tl.load(reset_ptr + row * steps + t, mask=there, other=0) != 0
        packed += tl.sum(tl.where(fresh, weight, 0), 1)
    here = there
    if valid_ptr is not None:
        here = here & (tl.load(valid_ptr + row * steps + t, mask=there, other=0) != 0)
    packed |= tl.sum(tl.where(here, weight, 0), 1) << 16
    tl.store(words_ptr + row * words + word, packed, mask=word < words)


def pack_masks(reset: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Words int32 [B, ceil(T / GROUP)] of masks bool [B, T]; None where there is neither mask."""
    mask = reset if reset is not None else valid
    if mask is None:
        return None
    rows, steps = mask.shape
    words = -(-steps // GROUP)
    packed = torch.empty(rows, words, dtype=torch.int32, device=mask.device)
    grid = (-(-words // WORDS), rows)
    if packed.numel():
        pack_masks_kernel[grid](
            as_bytes(reset), as_bytes(valid), packed, steps, words, GROUP=GROUP, WORDS=WORDS, num_warps=4
        )
    return packed


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask, row after row, as uint8."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def alignment(channels: int) -> int:
    """Largest power of two up to 16 that divides a row's length: what vector loads may rely on."""
    return math.gcd(channels, 16)


def compilations() -> list[Compilation]:
    """The kernel that packs masks, with either mask and with both."""
    found = []
    for name, missing in (("both", ()), ("reset", ("valid_ptr",)), ("valid", ("reset_ptr",))):
        types = {"reset_ptr": "*u8", "valid_ptr": "*u8", "words_ptr": "*i32", "steps": "i32", "words": "i32"}
        found.append(
            Compilation(
                kernel=pack_masks_kernel,
                name=f"pack_masks[{name}]",
                signature={key: kind for key, kind in types.items() if key not in missing},
                constants={"GROUP": GROUP, "WORDS": WORDS, **dict.fromkeys(missing)},
                num_warps=4,
            )
        )
    return found
