"""Functions that many parts use, in elementary operations."""

from __future__ import annotations

from torch import nn

from spikelm.energy.counts import Operations, macs
from spikelm.rope import Rope

SIGMOID = Operations(exponentials=1, additions=1, divisions=1)
"""1 / (1 + exp(-x))."""
SILU = SIGMOID + Operations(multiplications=1)
"""X sigmoid(x)."""
LOG_SIGMOID = Operations(exponentials=2, additions=2, comparisons=1)
"""min(x, 0) - log(1 + exp(-|x|))."""
SOFTPLUS = LOG_SIGMOID
"""max(x, 0) + log(1 + exp(-|x|))."""
LERP = macs(1, additions=1)
"""a + w (b - a)."""


def norm(module: nn.Module | None, times: float = 1.0) -> Operations:
    """A norm over F features, ``times`` per token.

    LayerNorm: mean (F additions), x - mean (F), variance (F multiply-accumulates), 1 / sqrt(variance + eps),
    F multiplications, gain and bias (F multiply-accumulates). RMSNorm: mean square (F multiply-accumulates),
    1 / sqrt(. + eps), F multiplications, gain (F multiplications).
    """
    if isinstance(module, nn.LayerNorm):
        F = module.normalized_shape[-1]
        one = macs(2 * F, additions=2 * F + 1, multiplications=F + 2, roots=1, divisions=1, values=2 * F)
    elif isinstance(module, nn.RMSNorm):
        F = module.normalized_shape[-1]
        one = macs(F, additions=1, multiplications=2 * F + 1, roots=1, divisions=1, values=2 * F)
    else:  # None or an identity: no norm
        return Operations()
    return times * one


def shift(features: int, mixes: int) -> Operations:
    """Token shift: ``mixes`` mixtures of a token of D features and the one before."""
    return mixes * features * LERP + Operations(values=(1 + mixes) * features)


def gated(features: int) -> Operations:
    """sigmoid(r) * y of D features."""
    return features * (SIGMOID + Operations(multiplications=1, values=3))


def rotated(rope: Rope | None, heads: float) -> Operations:
    """Rotary positions of ``heads`` heads (queries and keys): angles once, then two sums per pair and head.

    a cos - b sin and b cos + a sin: two multiplications and two multiply-accumulates.
    """
    if rope is None:
        return Operations()
    pairs = len(rope.frequencies)
    angles = Operations(multiplications=pairs, exponentials=2 * pairs)
    if rope.magnitude != 1.0:
        angles += Operations(multiplications=2 * pairs)
    return angles + heads * pairs * macs(2, multiplications=2, values=4)
