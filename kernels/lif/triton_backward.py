"""Backward Triton kernel of leaky integrate-and-fire (gradients as in op.c and scan.py).

A program owns BLOCK channels of one sequence and walks over its groups of steps from the last to the first.
Of each group it recomputes the membranes from the checkpoint that forward left (they stay in registers), then
goes back over the steps. The loads of the groups before are issued STAGES groups ahead, as in forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikelm.kernels.lif.triton_forward import after_spike, charge
from spikelm.kernels.triton_scan import rows_of


@triton.jit
def _slope(u, alpha, SURROGATE: tl.constexpr):
    """Surrogate derivative of the spike (surrogates.py)."""
    if SURROGATE == 0:  # atan
        z = (1.5707963267948966 * alpha) * u
        root = tl.rsqrt(tl.fma(z, z, 1.0))  # 1 / (1 + z^2) = root^2, cheaper than a division
        slope = (alpha * 0.5) * root * root
    elif SURROGATE == 1:  # sigmoid
        e = tl.exp(-tl.abs(alpha * u))
        slope = alpha * e / ((1.0 + e) * (1.0 + e))
    elif SURROGATE == 2:  # triangle
        slope = alpha * tl.maximum(1.0 - tl.abs(alpha * u), 0.0)
    else:  # straight through
        slope = tl.zeros_like(u) + 1.0
    return slope


@triton.jit(do_not_specialize=["steps", "channels"])
def lif_backward_kernel(
    grad_spikes_ptr,  # [B, T, C]
    grad_last_ptr,  # fp32 [B, C]
    x_ptr,  # [B, T, C]
    rate_ptr,  # fp32 [C]
    words_ptr,  # int32 [B, groups]; None without masks
    checkpoints_ptr,  # fp32 [B, groups, C]
    grad_x_ptr,  # [B, T, C]
    grad_first_ptr,  # fp32 [B, C]
    rate_rows_ptr,  # fp32 [B, C], each row's share of the rate's gradient
    threshold,
    v_reset,
    alpha,
    steps,
    channels,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    SOFT: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    """Gradients of BLOCK channels of one sequence."""
    channels = channels // ALIGN * ALIGN  # tells the compiler how rows are aligned
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    grad_v = tl.load(grad_last_ptr + row * channels + c, mask=inside)
    rate = tl.load(rate_ptr + c, mask=inside)
    rate_sum = tl.zeros([BLOCK], tl.float32)
    rest = 0.0 if SOFT else v_reset
    stride = channels.to(tl.int64)
    groups = tl.cdiv(steps, GROUP)
    x_ptr += row * steps * channels
    grad_spikes_ptr += row * steps * channels
    grad_x_ptr += row * steps * channels
    checkpoints_ptr += row * groups * channels
    if words_ptr is not None:
        words_ptr += row * groups
        upcoming = tl.load(words_ptr + groups - 1, mask=groups > 0, other=0)
    step = tl.arange(0, GROUP)[:, None]
    tile = step * channels + c[None, :]
    for back in tl.range(0, groups, num_stages=STAGES):
        group = groups - 1 - back
        first = group * stride
        left = steps - group * GROUP
        v = tl.load(checkpoints_ptr + first + c, mask=inside)
        there = inside[None, :]
        if not EVEN:
            there = there & (step < left)
        xs = rows_of(tl.load(x_ptr + first * GROUP + tile, mask=there), BLOCK)
        gs = rows_of(tl.load(grad_spikes_ptr + first * GROUP + tile, mask=there), BLOCK)
        if words_ptr is not None:
            word = upcoming
            upcoming = tl.load(words_ptr + group - 1, mask=group > 0, other=0)
        before = ()
        for i in tl.static_range(GROUP):
            if words_ptr is not None:
                v = tl.where(((word >> i) & 1) != 0, rest, v)
            before = before + (v,)
            h, _ = charge(xs[i].to(tl.float32), v, rate, v_reset, DECAY_INPUT)
            new = after_spike(h, threshold, v_reset, SOFT)
            if words_ptr is not None:
                new = tl.where(((word >> (16 + i)) & 1) != 0, new, v)
            v = new
        group_sum = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(GROUP - 1, -1, -1):
            h, drive = charge(xs[i].to(tl.float32), before[i], rate, v_reset, DECAY_INPUT)
            slope = _slope(h - threshold, alpha, SURROGATE)
            # d v_new / d h
            if SOFT:
                through = tl.full([BLOCK], 1.0, tl.float32)
                if not DETACH:
                    through = 1.0 - threshold * slope
            else:
                through = tl.where(h >= threshold, 0.0, 1.0)
                if not DETACH:
                    through = through - (h - v_reset) * slope
            grad_h = gs[i].to(tl.float32) * slope + grad_v * through
            grad_x = grad_h
            if DECAY_INPUT:
                grad_x = grad_h * rate
            by_rate = grad_h * drive
            kept = grad_h * (1.0 - rate)
            written = inside
            if words_ptr is not None:
                here = ((word >> (16 + i)) & 1) != 0
                grad_x = tl.where(here, grad_x, 0.0)
                by_rate = tl.where(here, by_rate, 0.0)
                kept = tl.where(here, kept, grad_v)
                kept = tl.where(((word >> i) & 1) != 0, 0.0, kept)
            elif not EVEN:
                by_rate = tl.where(i < left, by_rate, 0.0)
                kept = tl.where(i < left, kept, grad_v)
            if not EVEN:
                written = inside & (i < left)
            grad_v = kept
            group_sum += by_rate
            stored = grad_x.to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + first * GROUP + i * channels + c, stored, mask=written)
        rate_sum += group_sum
    tl.store(grad_first_ptr + row * channels + c, grad_v, mask=inside)
    tl.store(rate_rows_ptr + row * channels + c, rate_sum, mask=inside)
