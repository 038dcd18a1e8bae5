"""The wkv recurrence of RWKV-4 in plain torch, sequential over about 2 sqrt(T) steps instead of T.

The tokens are cut into chunks. (1) All chunks at once, from an empty state, one short loop over the
positions within a chunk. (2) A loop over the chunks carries the state from each to the next. (3) The outputs
of all tokens at once, from the state within the chunk and the decayed carry. Every state is held as
(num, den, max) and only ever multiplied by exponentials of non-positive numbers, so nothing overflows
whatever k is. Gradients are autograd's; the maxima are constants for it. Equations and masks as in
reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikelm.kernels.wkv4 import reference
from spikelm.kernels.wkv4.reference import EMPTY_MAX

LONGEST_CHUNK = 64


def wkv4(
    decay: Tensor,
    bonus: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, C] and state [B, 3, C] of decay [C], bonus [C], k and v [B, T, C]; one floating dtype."""
    batch, steps, channels = k.shape
    if steps <= 1:
        return reference.wkv4(decay, bonus, k, v, state, reset, valid)
    length = min(LONGEST_CHUNK, math.isqrt(steps - 1) + 1)
    extra = -steps % length
    if valid is None and extra:
        valid = torch.ones(batch, steps, dtype=torch.bool, device=k.device)
    k, v = _cut(k, length), _cut(v, length)
    here = None if valid is None else _cut(valid[..., None], length)
    fresh = None if reset is None else _cut(reset[..., None], length)
    if here is not None:
        # What stands at an invalid token (it may be NaN) stays out of every value and gradient.
        k, v = torch.where(here, k, 0.0), torch.where(here, v, 0.0)

    before, sums, last, last_top = _within_chunks(decay, k, v, fresh, here)

    # Decay from the start of a chunk to each of its tokens, and to its end.
    counted = k.new_ones(1, 1, length, 1) if here is None else here.to(k.dtype)
    passed = counted.cumsum(2)
    carried, carried_top, final = _across_chunks(
        passed[:, :, -1] * decay, state, last, last_top, None if fresh is None else fresh.any(2)
    )

    since = carried_top[:, :, None] + (passed - counted) * decay
    cut_off = None if fresh is None else fresh.cumsum(2) > 0
    current = bonus + k
    with torch.no_grad():
        top = torch.maximum(before, current)
        top = torch.maximum(top, since if cut_off is None else torch.where(cut_off, EMPTY_MAX, since))
    now = torch.exp(current - top)
    weights = torch.exp(before - top)
    from_carry = _exp_unless(cut_off, since - top)
    num = from_carry * carried[0][:, :, None] + weights * sums[0] + now * v
    den = from_carry * carried[1][:, :, None] + weights * sums[1] + now
    y = num / den
    if here is not None:
        y = torch.where(here, y, 0.0)
    return y.flatten(1, 2)[:, :steps], final


def _cut(x: Tensor, length: int) -> Tensor:
    """[B, T, C] -> [B, chunks, length, C], the last chunk filled up with zeros (false)."""
    extra = -x.shape[1] % length
    if extra:
        x = torch.cat([x, x.new_zeros(x.shape[0], extra, x.shape[2])], 1)
    return x.view(x.shape[0], x.shape[1] // length, length, x.shape[2])


def _exp_unless(masked: Tensor | None, exponent: Tensor) -> Tensor:
    """Exponential, 0 where masked; the mask hides exponents that would overflow, also in gradients."""
    if masked is None:
        return torch.exp(exponent)
    return torch.exp(torch.where(masked, 0.0, exponent)).masked_fill(masked, 0.0)


def _within_chunks(
    decay: Tensor, k: Tensor, v: Tensor, fresh: Tensor | None, here: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every chunk from an empty state.

    Returns:
        max before each token [B, n, L, C] and (num, den) before each token [2, B, n, L, C], both after its
        reset; (num, den) [2, B, n, C] and max [B, n, C] at the end of each chunk.
    """
    with torch.no_grad():
        top = torch.full_like(k[:, :, 0], EMPTY_MAX)
        befores, afters = [], []
        for i in range(k.shape[2]):
            if fresh is not None:
                top = torch.where(fresh[:, :, i], EMPTY_MAX, top)
            befores.append(top)
            new = torch.maximum(top + decay, k[:, :, i])
            top = new if here is None else torch.where(here[:, :, i], new, top)
            afters.append(top)
        before, after = torch.stack(befores, 2), torch.stack(afters, 2)
    skipped = None if here is None else ~here
    now = _exp_unless(skipped, k - after)
    past = torch.exp(before - after + (decay if here is None else here * decay))
    if fresh is not None:
        past = past.masked_fill(fresh, 0.0)
    state = torch.zeros_like(torch.stack([k[:, :, 0], k[:, :, 0]]))
    sums = []
    # unbind, not indexing: the gradient of an index is a tensor of zeros as large as the whole
    for enter, stay in zip(torch.stack([now * v, now]).unbind(3), past.unbind(2), strict=True):
        sums.append(state)
        state = torch.addcmul(enter, stay, state)
    prior = torch.stack(sums, 3)
    return before, prior if fresh is None else prior.masked_fill(fresh, 0.0), state, after[:, :, -1]


def _across_chunks(
    decay: Tensor, state: Tensor, last: Tensor, last_top: Tensor, fresh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Carries the state over the chunks.

    Args:
        decay: decay of a state over each chunk, broadcast to [B, n, C].
        state: the incoming state [B, 3, C].
        last: (num, den) [2, B, n, C] at the end of each chunk from an empty state.
        last_top: max [B, n, C] of ``last``.
        fresh: chunks [B, n, 1] with a reset, which let nothing through; or None.

    Returns:
        (num, den) [2, B, n, C] and max [B, n, C] at the start of each chunk, and the final state [B, 3, C].
    """
    decay = decay.expand_as(last_top)
    with torch.no_grad():
        top, tops = state[:, 2], [state[:, 2]]
        for j in range(last_top.shape[1]):
            decayed = top + decay[:, j]
            if fresh is not None:
                decayed = torch.where(fresh[:, j], EMPTY_MAX, decayed)
            top = torch.maximum(decayed, last_top[:, j])
            tops.append(top)
        start, end = torch.stack(tops[:-1], 1), torch.stack(tops[1:], 1)
    past = _exp_unless(fresh, start + decay - end)
    enter = torch.exp(last_top - end) * last
    carry = torch.stack([state[:, 0], state[:, 1]])
    carries = []
    for entering, stay in zip(enter.unbind(2), past.unbind(1), strict=True):
        carries.append(carry)
        carry = torch.addcmul(entering, stay, carry)
    return torch.stack(carries, 2), start, torch.stack([carry[0], carry[1], tops[-1]], 1)
