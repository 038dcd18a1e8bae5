"""Adaptive spike encoding as the equations say it (SpikingBrain, arXiv 2509.05276, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLD_FLOOR = 1e-8
"""Smallest threshold, so that an all-zero row gives zero counts."""


def encode(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, thresholds and what the cap cut off.

    Args:
        x: [.., D], float32 or float64.
        k: V = mean|x| / k.
        dead_zone: counts are zero where |x| < dead_zone * mean|x|.
        cap: |count| <= cap.
        mean: [.., 1], mean|x| of the whole rows where x holds a part of them; None for that of x.

    Returns:
        counts [.., D] (integers, in x's dtype), threshold V [.., 1], clipped bool [.., D].
    """
    magnitude = x.abs()
    mean = magnitude.mean(-1, keepdim=True) if mean is None else mean
    threshold = (mean / k).clamp(min=THRESHOLD_FLOOR)
    counts = torch.round(x / threshold)
    counts = torch.where(magnitude < dead_zone * mean, torch.zeros_like(counts), counts)
    clipped = counts.abs() > cap
    return counts.clamp(-cap, cap), threshold, clipped


def adaptive_encode(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Counts and thresholds; the gradient is that of x / V with constant V, where the cap does not bite."""
    with torch.no_grad():
        counts, threshold, clipped = encode(x, k, dead_zone, cap, mean)
    soft = x / threshold
    return torch.where(clipped, counts, counts + (soft - soft.detach())), threshold


def adaptive_encode_int8(
    x: Tensor, k: float, dead_zone: float, cap: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int8 [.., D], threshold [.., 1] and statistics int64 [.., 4] of x [.., D]; no gradient."""
    counts, threshold, clipped = encode(x.detach(), k, dead_zone, cap, mean)
    # int8 has no NaN: such counts are 0, and the row's threshold, NaN or infinite, still shows them.
    whole = counts.nan_to_num(nan=0.0).to(torch.int8)
    magnitude = whole.long().abs()
    largest = magnitude.amax(-1) if x.shape[-1] else magnitude.sum(-1)
    statistics = [(whole == 0).sum(-1), magnitude.sum(-1), clipped.sum(-1), largest]
    return whole, threshold, torch.stack(statistics, -1)


def decode_counts(counts: Tensor, threshold: Tensor) -> Tensor:
    """N V in the threshold's dtype; V is a constant for the gradient."""
    return counts.to(threshold.dtype) * threshold.detach()
