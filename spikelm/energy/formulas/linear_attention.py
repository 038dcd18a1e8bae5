"""Mixers with a state of fixed size: wkv4, gla, gla_tied, gated_delta."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from spikelm.energy.activity import Activity
from spikelm.energy.counts import Kinds, Operations, macs
from spikelm.energy.formulas.elementary import (
    LOG_SIGMOID,
    SIGMOID,
    SILU,
    SOFTPLUS,
    gated,
    norm,
    rotated,
    shift,
)
from spikelm.energy.operations import operations
from spikelm.mixers.gated_delta import GatedDelta
from spikelm.mixers.gla import GLA, GatedLinearAttention, TiedGLA
from spikelm.mixers.wkv4 import WKV4


@operations.register
def _(part: WKV4, activity: Activity) -> Kinds:
    """RWKV-4 (arXiv 2305.13048, equations 11 to 18), per channel.

    Exponents: u + k, p + w, and four differences: 6 additions, 2 comparisons; 2 exponentials (kernels/wkv4:
    of each pair of exponentials one has the argument 0). Output: one multiplication and two
    multiply-accumulates for numerator and denominator, a division. New sums: one multiplication, two
    multiply-accumulates. Before: three mixtures; after: sigmoid(r) * y.
    """
    D = part.key.out_features
    each = macs(4, additions=6, comparisons=2, exponentials=2, multiplications=2, divisions=1, values=3)
    return {"shift": shift(part.hidden_size, 3), "recurrence": D * each, "gate": gated(D)}


@dataclass(frozen=True)
class _Sizes:
    """H query heads and G key-value heads of K features; the state is [G, K, K]."""

    H: int
    G: int
    K: int


def _sizes(part: GatedLinearAttention) -> _Sizes:
    K = part.head_dim
    return _Sizes(part.query.out_features // K, part.key.out_features // K, K)


def _common(part: GatedLinearAttention) -> dict[str, Operations]:
    """Feature map, norms of heads, rotary positions, gate on the output."""
    s = _sizes(part)
    kinds = {
        "norm": norm(part.query_norm, s.H) + norm(part.key_norm, s.G) + norm(part.output_norm, s.H),
        "rotation": rotated(part.rope, s.H + s.G),
    }
    mapped = (s.H + s.G) * s.K
    if part.feature_map == "relu":
        kinds["activation"] = mapped * Operations(comparisons=1, values=2)
    elif part.feature_map == "sigmoid":
        kinds["activation"] = mapped * SIGMOID + Operations(values=2 * mapped)
    if isinstance(part.output_gate, nn.Module):
        kinds["gate"] = s.H * s.K * (SILU + Operations(multiplications=1, values=3))
    return kinds


def _linear(s: _Sizes, gates: int) -> Operations:
    """S <- diag(alpha) S + k^T v: G K^2 multiplications and multiply-accumulates; o = K^-1/2 q S: H K^2.

    The scale is H K multiplications, the exponentials of the log gates are ``gates``.
    """
    write = macs(s.G * s.K**2, multiplications=s.G * s.K**2, exponentials=gates)
    read = macs(s.H * s.K**2, multiplications=s.H * s.K)
    return write + read + Operations(values=(2 * s.H + 2 * s.G) * s.K + gates)


def _plus(kinds: dict[str, Operations], kind: str, more: Operations) -> None:
    kinds[kind] = kinds.get(kind, Operations()) + more


@operations.register
def _(part: GLA, activity: Activity) -> Kinds:
    """Gated linear attention (arXiv 2312.06635, equation 3 and section 4.4).

    Gate: logsigmoid of G K features, one multiplication each with 1 / divisor. See ``_linear``.
    """
    s, kinds = _sizes(part), _common(part)
    _plus(kinds, "gate", s.G * s.K * (LOG_SIGMOID + Operations(multiplications=1, values=2)))
    kinds["recurrence"] = _linear(s, s.G * s.K)
    return kinds


@operations.register
def _(part: TiedGLA, activity: Activity) -> Kinds:
    """The gate is log(1 - k) = logsigmoid of the keys before the feature map, G K of them."""
    s, kinds = _sizes(part), _common(part)
    _plus(kinds, "gate", s.G * s.K * (LOG_SIGMOID + Operations(values=2)))
    kinds["recurrence"] = _linear(s, s.G * s.K)
    return kinds


@operations.register
def _(part: GatedDelta, activity: Activity) -> Kinds:
    """Gated delta rule (arXiv 2412.06464, equation 10), per key-value head.

    S <- alpha S: K^2 multiplications; k S: K^2 multiply-accumulates; v - k S: K additions, beta: K
    multiplications; + k^T (.): K^2 multiply-accumulates. o: as in ``_linear``. alpha: softplus of G numbers
    with an addition before and a multiplication after, G exponentials; beta: sigmoid of G. Unit length of H
    queries and G keys: K multiply-accumulates, an addition, 1 / sqrt, K multiplications. Without a
    convolution SiLU of queries, keys and values.
    """
    s, kinds = _sizes(part), _common(part)
    if not part.convolved:
        width = (s.H + 2 * s.G) * s.K
        _plus(kinds, "activation", width * SILU + Operations(values=2 * width))
    beta = SIGMOID + Operations(multiplications=0 if part.strongest == 1.0 else 1)
    _plus(kinds, "gate", s.G * (SOFTPLUS + Operations(additions=1, multiplications=1, values=4) + beta))
    unit = macs(s.K, additions=1, roots=1, divisions=1, multiplications=s.K, values=2 * s.K)
    kinds["norm"] += (s.H + s.G) * unit
    erase = macs(s.G * s.K**2, additions=s.G * s.K, multiplications=s.G * s.K)
    kinds["recurrence"] = _linear(s, s.G) + erase
    return kinds
