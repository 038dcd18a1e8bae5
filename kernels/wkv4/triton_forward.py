"""Forward Triton kernels of the wkv recurrence (equations in reference.py).

A program owns BLOCK channels of one chunk of one sequence and walks over the chunk's steps, with the loads
issued STAGES groups of GROUP steps ahead. Where batch and channels alone fill the device there is one chunk.
Otherwise the sequence is cut: the state (num, den, max) is associative, so (1) wkv4_summary_kernel takes
every chunk from an empty state, (2) wkv4_carry_kernel carries the state over the chunks,
(3) wkv4_forward_kernel starts every chunk from its carry.

Of the two exponentials of a weighted sum one is always exp(0): one exponential and one comparison do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikelm.kernels.triton_scan import rows_of


@triton.jit
def weigh(past, now):
    """exp(past - top) and exp(now - top) for top = max(past, now)."""
    difference = past - now
    # exp2 of a scaled number becomes one instruction where exp would guard against denormal numbers.
    smaller = tl.exp2(tl.abs(difference) * -1.4426950408889634)
    ahead = difference > 0
    return tl.where(ahead, 1.0, smaller), tl.where(ahead, smaller, 1.0)


@triton.jit
def reciprocal(x):
    """1 / x of a positive number to a few roundings: two instructions where a division takes eight."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit(do_not_specialize=["steps", "chunk", "channels"])
def wkv4_forward_kernel(
    decay_ptr,  # fp32 [C]
    bonus_ptr,  # fp32 [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    carry_ptr,  # fp32 [B, chunks, 3, C]
    words_ptr,  # int32 [B, groups], see triton_scan.py; None without masks
    y_ptr,  # [B, T, C]
    last_ptr,  # fp32 [B, 3, C]
    checkpoints_ptr,  # fp32 [B, groups, 3, C]; None where no gradient will be asked for
    steps,
    chunk,  # groups of a chunk
    channels,
    EMPTY_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # steps are a multiple of GROUP
    ALIGN: tl.constexpr,  # channels are a multiple of it
):
    """Outputs of BLOCK channels of one chunk, and its checkpoints."""
    channels = channels // ALIGN * ALIGN  # tells the compiler how rows are aligned
    row = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    decay = tl.load(decay_ptr + c, mask=inside)
    bonus = tl.load(bonus_ptr + c, mask=inside)
    stride = tl.cast(channels, tl.int64)
    carry_ptr += (row * chunks + tl.program_id(1)) * 3 * stride
    num = tl.load(carry_ptr + c, mask=inside)
    den = tl.load(carry_ptr + stride + c, mask=inside)
    top = tl.load(carry_ptr + 2 * stride + c, mask=inside)
    groups = tl.cdiv(steps, GROUP)
    first_group = tl.program_id(1) * chunk
    last_group = tl.minimum(first_group + chunk, groups)
    k_ptr += row * steps * stride
    v_ptr += row * steps * stride
    y_ptr += row * steps * stride
    if checkpoints_ptr is not None:
        checkpoints_ptr += row * groups * 3 * stride
    if words_ptr is not None:
        words_ptr += row * groups
        upcoming = tl.load(words_ptr + first_group, mask=first_group < groups, other=0)
    step = tl.arange(0, GROUP)[:, None]
    tile = step * channels + c[None, :]
    for group in tl.range(first_group, last_group, num_stages=STAGES):
        first = group * stride
        left = steps - group * GROUP
        there = inside[None, :]
        if not EVEN:
            there = there & (step < left)
        ks = rows_of(tl.load(k_ptr + first * GROUP + tile, mask=there), BLOCK)
        vs = rows_of(tl.load(v_ptr + first * GROUP + tile, mask=there), BLOCK)
        if words_ptr is not None:
            # The next group's word, one group ahead: its latency is hidden behind this group's steps.
            word = upcoming
            upcoming = tl.load(words_ptr + group + 1, mask=group + 1 < groups, other=0)
        if checkpoints_ptr is not None:
            tl.store(checkpoints_ptr + 3 * first + c, num, mask=inside)
            tl.store(checkpoints_ptr + 3 * first + stride + c, den, mask=inside)
            tl.store(checkpoints_ptr + 3 * first + 2 * stride + c, top, mask=inside)
        for i in tl.static_range(GROUP):
            k = ks[i].to(tl.float32)
            v = vs[i].to(tl.float32)
            if words_ptr is not None:
                fresh = ((word >> i) & 1) != 0
                num = tl.where(fresh, 0.0, num)
                den = tl.where(fresh, 0.0, den)
                top = tl.where(fresh, EMPTY_MAX, top)
            past, now = weigh(top, bonus + k)
            y = (past * num + now * v) * reciprocal(past * den + now)
            decayed = top + decay
            past, now = weigh(decayed, k)
            new_num = past * num + now * v
            new_den = past * den + now
            new_top = tl.maximum(decayed, k)
            written = inside
            if words_ptr is not None:
                here = ((word >> (16 + i)) & 1) != 0
                y = tl.where(here, y, 0.0)
                new_num = tl.where(here, new_num, num)
                new_den = tl.where(here, new_den, den)
                new_top = tl.where(here, new_top, top)
            elif not EVEN:
                new_num = tl.where(i < left, new_num, num)
                new_den = tl.where(i < left, new_den, den)
                new_top = tl.where(i < left, new_top, top)
            if not EVEN:
                written = inside & (i < left)
            num = new_num
            den = new_den
            top = new_top
            tl.store(y_ptr + first * GROUP + i * channels + c, y.to(y_ptr.dtype.element_ty), mask=written)
    if tl.program_id(1) == chunks - 1:
        last_ptr += row * 3 * stride
        tl.store(last_ptr + c, num, mask=inside)
        tl.store(last_ptr + stride + c, den, mask=inside)
        tl.store(last_ptr + 2 * stride + c, top, mask=inside)


@triton.jit(do_not_specialize=["steps", "chunk", "channels"])
def wkv4_summary_kernel(
    decay_ptr,  # fp32 [C]
    k_ptr,  # [B, T, C]
    v_ptr,  # [B, T, C]
    words_ptr,  # int32 [B, groups]; None without masks
    summary_ptr,  # fp32 [B, chunks, 3, C]
    passed_ptr,  # int32 [B, chunks]: valid steps; -1 where a reset lets nothing through
    steps,
    chunk,
    channels,
    EMPTY_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """State at the end of every chunk but the last, from an empty one; those are whole groups."""
    channels = channels // ALIGN * ALIGN
    row = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1) + 1
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    decay = tl.load(decay_ptr + c, mask=inside)
    stride = tl.cast(channels, tl.int64)
    groups = tl.cdiv(steps, GROUP)
    first_group = tl.program_id(1) * chunk
    k_ptr += row * steps * stride
    v_ptr += row * steps * stride
    num = tl.zeros([BLOCK], tl.float32)
    den = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], EMPTY_MAX, tl.float32)
    passed = chunk * GROUP
    if words_ptr is not None:
        words_ptr += row * groups
        upcoming = tl.load(words_ptr + first_group)
        passed = 0
        any_fresh = 0
    tile = tl.arange(0, GROUP)[:, None] * channels + c[None, :]
    for group in tl.range(first_group, first_group + chunk, num_stages=STAGES):
        first = group * stride * GROUP
        ks = rows_of(tl.load(k_ptr + first + tile, mask=inside[None, :]), BLOCK)
        vs = rows_of(tl.load(v_ptr + first + tile, mask=inside[None, :]), BLOCK)
        if words_ptr is not None:
            word = upcoming
            upcoming = tl.load(words_ptr + group + 1, mask=group + 1 < groups, other=0)
        for i in tl.static_range(GROUP):
            k = ks[i].to(tl.float32)
            v = vs[i].to(tl.float32)
            if words_ptr is not None:
                fresh = ((word >> i) & 1) != 0
                num = tl.where(fresh, 0.0, num)
                den = tl.where(fresh, 0.0, den)
                top = tl.where(fresh, EMPTY_MAX, top)
                any_fresh = any_fresh | ((word >> i) & 1)
                passed += (word >> (16 + i)) & 1
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
    if words_ptr is not None:
        passed = tl.where(any_fresh != 0, -1, passed)
    place = row * chunks + tl.program_id(1)
    summary_ptr += place * 3 * stride
    tl.store(summary_ptr + c, num, mask=inside)
    tl.store(summary_ptr + stride + c, den, mask=inside)
    tl.store(summary_ptr + 2 * stride + c, top, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(passed_ptr + place, passed)


@triton.jit(do_not_specialize=["chunks", "channels"])
def wkv4_carry_kernel(
    decay_ptr,  # fp32 [C]
    state_ptr,  # fp32 [B, 3, C]
    summary_ptr,  # fp32 [B, chunks, 3, C]; replaced by the carry into every chunk
    passed_ptr,  # int32 [B, chunks]
    chunks,
    channels,
    BLOCK: tl.constexpr,
):
    """State before every chunk, from the incoming state and the chunks' summaries."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    stride = tl.cast(channels, tl.int64)
    decay = tl.load(decay_ptr + c, mask=inside)
    state_ptr += row * 3 * stride
    num = tl.load(state_ptr + c, mask=inside)
    den = tl.load(state_ptr + stride + c, mask=inside)
    top = tl.load(state_ptr + 2 * stride + c, mask=inside)
    summary_ptr += row * chunks * 3 * stride
    passed_ptr += row * chunks
    for chunk in range(0, chunks - 1):
        at = summary_ptr + chunk * 3 * stride
        chunk_num = tl.load(at + c, mask=inside)
        chunk_den = tl.load(at + stride + c, mask=inside)
        chunk_top = tl.load(at + 2 * stride + c, mask=inside)
        passed = tl.load(passed_ptr + chunk)
        tl.store(at + c, num, mask=inside)
        tl.store(at + stride + c, den, mask=inside)
        tl.store(at + 2 * stride + c, top, mask=inside)
        decayed = top + passed.to(tl.float32) * decay
        past, now = weigh(decayed, chunk_top)
        cut = passed < 0
        num = tl.where(cut, chunk_num, past * num + now * chunk_num)
        den = tl.where(cut, chunk_den, past * den + now * chunk_den)
        top = tl.where(cut, chunk_top, tl.maximum(decayed, chunk_top))
    at = summary_ptr + (chunks - 1) * 3 * stride
    tl.store(at + c, num, mask=inside)
    tl.store(at + stride + c, den, mask=inside)
    tl.store(at + 2 * stride + c, top, mask=inside)


@triton.jit(do_not_specialize=["channels"])
def wkv4_decode_kernel(
    decay_ptr,  # fp32 [C]
    bonus_ptr,  # fp32 [C]
    k_ptr,  # [B, C]
    v_ptr,  # [B, C]
    pool_ptr,  # fp32 [S, 3, C], updated in place
    slots_ptr,  # int32 or int64 [B]
    y_ptr,  # [B, C]
    channels,
    BLOCK: tl.constexpr,
):
    """One token of rows that keep their states in a pool; a negative slot is a row that does nothing."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    used = inside & (slot >= 0)
    stride = tl.cast(channels, tl.int64)
    pool_ptr += slot * 3 * stride
    num = tl.load(pool_ptr + c, mask=used, other=0.0)
    den = tl.load(pool_ptr + stride + c, mask=used, other=0.0)
    top = tl.load(pool_ptr + 2 * stride + c, mask=used, other=0.0)
    decay = tl.load(decay_ptr + c, mask=inside)
    bonus = tl.load(bonus_ptr + c, mask=inside)
    k = tl.load(k_ptr + row * stride + c, mask=inside).to(tl.float32)
    v = tl.load(v_ptr + row * stride + c, mask=inside).to(tl.float32)
    past, now = weigh(top, bonus + k)
    y = tl.where(used, (past * num + now * v) / (past * den + now), 0.0)
    tl.store(y_ptr + row * stride + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    decayed = top + decay
    past, now = weigh(decayed, k)
    tl.store(pool_ptr + c, past * num + now * v, mask=used)
    tl.store(pool_ptr + stride + c, past * den + now, mask=used)
    tl.store(pool_ptr + 2 * stride + c, tl.maximum(decayed, k), mask=used)
