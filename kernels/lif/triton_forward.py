"""Forward Triton kernels of leaky integrate-and-fire (equations in reference.py).

A membrane is sequential in time, so a program owns BLOCK channels of one sequence and walks over all its
steps. What limits such a scan is the latency of its loads: they are issued STAGES groups of GROUP steps ahead
(asynchronous copies into shared memory), so that a device full of programs keeps enough bytes in flight.

Products and sums are written as in the reference and must not be contracted (enable_fp_fusion=False at
launch): the membranes are those of the reference, bit for bit, and backward recomputes what forward saw.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikelm.kernels.triton_scan import rows_of


@triton.jit
def charge(x, v, rate, v_reset, DECAY_INPUT: tl.constexpr):
    """Charged membrane h, and d h / d rate."""
    above = v - v_reset
    if DECAY_INPUT:
        drive = x - above
        h = v + drive * rate
    else:
        drive = -above
        h = (v - above * rate) + x
    return h, drive


@triton.jit
def after_spike(h, threshold, v_reset, SOFT: tl.constexpr):
    """Membrane after the reset that follows the charge."""
    after = h - threshold if SOFT else v_reset
    return tl.where(h >= threshold, after, h)


@triton.jit(do_not_specialize=["steps", "channels"])
def lif_forward_kernel(
    x_ptr,  # [B, T, C]
    v_ptr,  # fp32 [B, C]
    rate_ptr,  # fp32 [C]
    words_ptr,  # int32 [B, groups], see triton_scan.py; None without masks
    spikes_ptr,  # [B, T, C]
    last_ptr,  # fp32 [B, C]
    checkpoints_ptr,  # fp32 [B, groups, C]; None where no gradient will be asked for
    threshold,
    v_reset,
    steps,
    channels,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # steps are a multiple of GROUP
    ALIGN: tl.constexpr,  # channels are a multiple of it
    SOFT: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
):
    """Spikes and last membrane of BLOCK channels of one sequence."""
    channels = channels // ALIGN * ALIGN  # tells the compiler how rows are aligned
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    v = tl.load(v_ptr + row * channels + c, mask=inside)
    rate = tl.load(rate_ptr + c, mask=inside)
    rest = 0.0 if SOFT else v_reset
    stride = channels.to(tl.int64)
    groups = tl.cdiv(steps, GROUP)
    x_ptr += row * steps * channels
    spikes_ptr += row * steps * channels
    if checkpoints_ptr is not None:
        checkpoints_ptr += row * groups * channels
    if words_ptr is not None:
        words_ptr += row * groups
        upcoming = tl.load(words_ptr, mask=groups > 0, other=0)
    step = tl.arange(0, GROUP)[:, None]
    tile = step * channels + c[None, :]
    for group in tl.range(0, groups, num_stages=STAGES):
        first = group * stride
        left = steps - group * GROUP
        there = inside[None, :]
        if not EVEN:
            there = there & (step < left)
        xs = rows_of(tl.load(x_ptr + first * GROUP + tile, mask=there), BLOCK)
        if words_ptr is not None:
            # The next group's word, one group ahead: its latency is hidden behind this group's steps.
            word = upcoming
            upcoming = tl.load(words_ptr + group + 1, mask=group + 1 < groups, other=0)
        if checkpoints_ptr is not None:
            tl.store(checkpoints_ptr + first + c, v, mask=inside)
        for i in tl.static_range(GROUP):
            if words_ptr is not None:
                v = tl.where(((word >> i) & 1) != 0, rest, v)
            h, _ = charge(xs[i].to(tl.float32), v, rate, v_reset, DECAY_INPUT)
            fired = h >= threshold
            new = after_spike(h, threshold, v_reset, SOFT)
            written = inside
            if words_ptr is not None:
                here = ((word >> (16 + i)) & 1) != 0
                fired = fired & here
                new = tl.where(here, new, v)
            elif not EVEN:
                new = tl.where(i < left, new, v)
            if not EVEN:
                written = inside & (i < left)
            v = new
            spikes = fired.to(spikes_ptr.dtype.element_ty)
            tl.store(spikes_ptr + first * GROUP + i * channels + c, spikes, mask=written)
    tl.store(last_ptr + row * channels + c, v, mask=inside)


@triton.jit(do_not_specialize=["channels"])
def lif_decode_kernel(
    x_ptr,  # [B, C]
    pool_ptr,  # fp32 [S, C], updated in place
    slots_ptr,  # int32 or int64 [B]
    rate_ptr,  # fp32 [C]
    spikes_ptr,  # [B, C]
    threshold,
    v_reset,
    channels,
    BLOCK: tl.constexpr,
    SOFT: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
):
    """One token of rows that keep their membranes in a pool; a negative slot is a row that does nothing."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    used = inside & (slot >= 0)
    v = tl.load(pool_ptr + slot * channels + c, mask=used)
    rate = tl.load(rate_ptr + c, mask=inside)
    x = tl.load(x_ptr + row * channels + c, mask=inside).to(tl.float32)
    h, _ = charge(x, v, rate, v_reset, DECAY_INPUT)
    fired = (h >= threshold) & (slot >= 0)
    tl.store(spikes_ptr + row * channels + c, fired.to(spikes_ptr.dtype.element_ty), mask=inside)
    tl.store(pool_ptr + slot * channels + c, after_spike(h, threshold, v_reset, SOFT), mask=used)
