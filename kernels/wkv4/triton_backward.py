"""Backward Triton kernels of the wkv recurrence (gradients as in op.c).

A program walks over its groups of steps from the last to the first, recomputing each group's states from the
checkpoint that forward left; they stay in registers. Gradients of num and den are taken at a fixed max, as
the reference does, so every factor is at most one and nothing overflows.

Where the sequence is cut into chunks: the gradient of a state passes a chunk linearly, times one factor per
channel. (1) wkv4_backward_kernel with SUMMARY gives the gradient at every chunk's start for none at its end,
(2) wkv4_carry_back_kernel carries the gradient over the chunks, last to first, (3) wkv4_backward_kernel
starts from it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikelm.kernels.triton_scan import rows_of
from spikelm.kernels.wkv4.triton_forward import reciprocal, weigh


@triton.jit(do_not_specialize=["steps", "chunk", "channels"])
def wkv4_backward_kernel(
    grad_y_ptr,  # [B, T, C]
    carry_ptr,  # fp32 [B, chunks, 2, C], gradient of (num, den) after every chunk; with SUMMARY written
    decay_ptr,  # fp32 [C]
    bonus_ptr,  # fp32 [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    words_ptr,  # int32 [B, groups]; None without masks
    checkpoints_ptr,  # fp32 [B, groups, 3, C]
    grad_k_ptr,  # [B, T, C]
    grad_v_ptr,  # [B, T, C]
    grad_state_ptr,  # fp32 [B, 3, C]
    decay_rows_ptr,  # fp32 [B, chunks, C], each chunk's share of the decay's gradient
    bonus_rows_ptr,  # fp32 [B, chunks, C]
    steps,
    chunk,  # groups of a chunk
    channels,
    EMPTY_MAX: tl.constexpr,
    SUMMARY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients of BLOCK channels of one chunk."""
    channels = channels // ALIGN * ALIGN  # tells the compiler how rows are aligned
    row = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    here_chunk = tl.program_id(1)
    if SUMMARY:
        chunks += 1  # nothing lies before the first chunk
        here_chunk += 1
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    decay = tl.load(decay_ptr + c, mask=inside)
    bonus = tl.load(bonus_ptr + c, mask=inside)
    stride = tl.cast(channels, tl.int64)
    place = row * chunks + here_chunk
    carry_ptr += place * 2 * stride
    if SUMMARY:
        grad_num = tl.zeros([BLOCK], tl.float32)
        grad_den = tl.zeros([BLOCK], tl.float32)
    else:
        grad_num = tl.load(carry_ptr + c, mask=inside)
        grad_den = tl.load(carry_ptr + stride + c, mask=inside)
    decay_sum = tl.zeros([BLOCK], tl.float32)
    bonus_sum = tl.zeros([BLOCK], tl.float32)
    groups = tl.cdiv(steps, GROUP)
    first_group = here_chunk * chunk
    last_group = tl.minimum(first_group + chunk, groups)
    grad_y_ptr += row * steps * stride
    k_ptr += row * steps * stride
    v_ptr += row * steps * stride
    if not SUMMARY:
        grad_k_ptr += row * steps * stride
        grad_v_ptr += row * steps * stride
    checkpoints_ptr += row * groups * 3 * stride
    if words_ptr is not None:
        words_ptr += row * groups
        upcoming = tl.load(words_ptr + last_group - 1, mask=last_group > first_group, other=0)
    step = tl.arange(0, GROUP)[:, None]
    tile = step * channels + c[None, :]
    for back in tl.range(0, last_group - first_group, num_stages=STAGES):
        group = last_group - 1 - back
        first = group * stride
        left = steps - group * GROUP
        there = inside[None, :]
        if not EVEN:
            there = there & (step < left)
        num = tl.load(checkpoints_ptr + 3 * first + c, mask=inside)
        den = tl.load(checkpoints_ptr + 3 * first + stride + c, mask=inside)
        top = tl.load(checkpoints_ptr + 3 * first + 2 * stride + c, mask=inside)
        ks = rows_of(tl.load(k_ptr + first * GROUP + tile, mask=there), BLOCK)
        vs = rows_of(tl.load(v_ptr + first * GROUP + tile, mask=there), BLOCK)
        gs = rows_of(tl.load(grad_y_ptr + first * GROUP + tile, mask=there), BLOCK)
        if words_ptr is not None:
            word = upcoming
            upcoming = tl.load(words_ptr + group - 1, mask=group > first_group, other=0)
        nums = ()
        dens = ()
        tops = ()
        for i in tl.static_range(GROUP):
            k = ks[i].to(tl.float32)
            v = vs[i].to(tl.float32)
            if words_ptr is not None:
                fresh = ((word >> i) & 1) != 0
                num = tl.where(fresh, 0.0, num)
                den = tl.where(fresh, 0.0, den)
                top = tl.where(fresh, EMPTY_MAX, top)
            nums = nums + (num,)
            dens = dens + (den,)
            tops = tops + (top,)
            decayed = top + decay
            past, now = weigh(decayed, k)
            new_num = past * num + now * v
            new_den = past * den + now
            new_top = tl.maximum(decayed, k)
            if words_ptr is not None:
                here = ((word >> (16 + i)) & 1) != 0
                new_num = tl.where(here, new_num, num)
                new_den = tl.where(here, new_den, den)
                new_top = tl.where(here, new_top, top)
            num = new_num
            den = new_den
            top = new_top
        group_decay = tl.zeros([BLOCK], tl.float32)
        group_bonus = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(GROUP - 1, -1, -1):
            k = ks[i].to(tl.float32)
            v = vs[i].to(tl.float32)
            past, now = weigh(tops[i], bonus + k)
            inverse = reciprocal(past * dens[i] + now)
            y = (past * nums[i] + now * v) * inverse
            numerator = gs[i].to(tl.float32) * inverse  # its gradient
            by_past = past * numerator
            by_now = now * numerator
            past, now = weigh(tops[i] + decay, k)
            past_num = past * grad_num
            past_den = past * grad_den
            through_output = by_now * (v - y)
            by_decay = past_num * nums[i] + past_den * dens[i]
            grad_k = through_output + now * (grad_num * v + grad_den)
            grad_v = by_now + now * grad_num
            new_num = past_num + by_past
            new_den = past_den - by_past * y
            written = inside
            if words_ptr is not None:
                here = ((word >> (16 + i)) & 1) != 0
                fresh = ((word >> i) & 1) != 0
                through_output = tl.where(here, through_output, 0.0)
                by_decay = tl.where(here, by_decay, 0.0)
                grad_k = tl.where(here, grad_k, 0.0)
                grad_v = tl.where(here, grad_v, 0.0)
                new_num = tl.where(fresh, 0.0, tl.where(here, new_num, grad_num))
                new_den = tl.where(fresh, 0.0, tl.where(here, new_den, grad_den))
            elif not EVEN:
                through_output = tl.where(i < left, through_output, 0.0)
                by_decay = tl.where(i < left, by_decay, 0.0)
                new_num = tl.where(i < left, new_num, grad_num)
                new_den = tl.where(i < left, new_den, grad_den)
            if not EVEN:
                written = inside & (i < left)
            grad_num = new_num
            grad_den = new_den
            if not SUMMARY:
                group_bonus += through_output
                group_decay += by_decay
                at = first * GROUP + i * channels
                tl.store(grad_k_ptr + at + c, grad_k.to(grad_k_ptr.dtype.element_ty), mask=written)
                tl.store(grad_v_ptr + at + c, grad_v.to(grad_v_ptr.dtype.element_ty), mask=written)
        decay_sum += group_decay
        bonus_sum += group_bonus
    if SUMMARY:
        tl.store(carry_ptr + c, grad_num, mask=inside)
        tl.store(carry_ptr + stride + c, grad_den, mask=inside)
    else:
        tl.store(decay_rows_ptr + place * stride + c, decay_sum, mask=inside)
        tl.store(bonus_rows_ptr + place * stride + c, bonus_sum, mask=inside)
        if here_chunk == 0:
            grad_state_ptr += row * 3 * stride
            tl.store(grad_state_ptr + c, grad_num, mask=inside)
            tl.store(grad_state_ptr + stride + c, grad_den, mask=inside)
            tl.store(grad_state_ptr + 2 * stride + c, tl.zeros([BLOCK], tl.float32), mask=inside)


@triton.jit(do_not_specialize=["steps", "chunk", "chunks", "channels"])
def wkv4_carry_back_kernel(
    grad_last_ptr,  # fp32 [B, 3, C]
    last_ptr,  # fp32 [B, 3, C], the state that forward returned
    decay_ptr,  # fp32 [C]
    words_ptr,  # int32 [B, groups]; None without masks
    checkpoints_ptr,  # fp32 [B, groups, 3, C]
    carry_ptr,  # fp32 [B, chunks, 2, C]: at every chunk's start for none at its end -> at its end
    steps,
    chunk,
    chunks,
    channels,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient of (num, den) after every chunk."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    stride = tl.cast(channels, tl.int64)
    groups = tl.cdiv(steps, GROUP)
    decay = tl.load(decay_ptr + c, mask=inside)
    grad_last_ptr += row * 3 * stride
    grad_num = tl.load(grad_last_ptr + c, mask=inside)
    grad_den = tl.load(grad_last_ptr + stride + c, mask=inside)
    top_after = tl.load(last_ptr + row * 3 * stride + 2 * stride + c, mask=inside)
    checkpoints_ptr += row * groups * 3 * stride
    carry_ptr += row * chunks * 2 * stride
    for back in range(0, chunks - 1):
        j = chunks - 1 - back
        at = carry_ptr + j * 2 * stride
        own_num = tl.load(at + c, mask=inside)
        own_den = tl.load(at + stride + c, mask=inside)
        top = tl.load(checkpoints_ptr + (j * chunk * 3 + 2) * stride + c, mask=inside)
        tl.store(at + c, grad_num, mask=inside)
        tl.store(at + stride + c, grad_den, mask=inside)
        passed = tl.minimum(steps, (j + 1) * chunk * GROUP) - j * chunk * GROUP
        cut = 0
        if words_ptr is not None:
            passed = 0
            for group in range(j * chunk, tl.minimum((j + 1) * chunk, groups)):
                word = tl.load(words_ptr + row * groups + group)
                cut = cut | (word & 0xFFFF)
                for i in tl.static_range(GROUP):
                    passed += (word >> (16 + i)) & 1
        # The product of all steps' factors exp(max + decay - new max).
        factor = tl.exp(tl.minimum(top + passed.to(tl.float32) * decay - top_after, 0.0))
        factor = tl.where(cut != 0, 0.0, factor)
        grad_num = own_num + factor * grad_num
        grad_den = own_den + factor * grad_den
        top_after = top
    tl.store(carry_ptr + c, grad_num, mask=inside)
    tl.store(carry_ptr + stride + c, grad_den, mask=inside)
