"""``gated_delta``: gated delta rule (Gated DeltaNet, arXiv 2412.06464), the recurrence of SpikingBrain 2.0.

Linear attention whose state replaces what it knows about a key, instead of adding to it. Per key-value head,
with queries, keys and values from projections of x, each through a short convolution and SiLU::

    q, k = q / |q|, k / |k|
    alpha_t = exp(-A softplus(W_a x + b)),   beta_t = sigmoid(W_b x)
    S_t = alpha_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t                    (equation 10)
    o_t = K^-1/2 q_t S_t
    y = W_o (norm(o) * silu(W_r x))

A = exp(A_log) > 0 and b = dt_bias are numbers per key-value head. alpha forgets everything a little (the gate
of Mamba-2), beta says how much of the value under this key is replaced: 1 replaces it, 0 writes nothing. With
``allow_negative`` beta lies between 0 and 2 and I - beta k^T k has eigenvalues down to -1 (arXiv 2411.12537).

Order: projection, short convolution, QK norm, rotary positions, L2 norm. State: {"memory": [B, G, K, V] for G
key-value heads, "position": int64 [B] with rope, the windows "query_convolution", "key_convolution",
"value_convolution" [B, n - 1, ...], and the input neurons' states under the projections' names}.

Deviations from the published layer: a group of queries shares keys, values and the state, as in the softmax
checkpoints that are converted (Qwen3-Next shares queries and keys among several values; without groups both
are the same). V = K. A and b start evenly spread instead of drawn.

SpikingBrain 2.0 (arXiv 2604.22575) puts this recurrence, without the convolution (SiLU stays) and without the
gate on the output, into its linear layers, and adds what is not here:

- sparse state expansion (SSE, arXiv 2507.16577): the state consists of several partitions with shared
  parameters; every token writes and reads the few that a top-k choice gives it, so the state grows without
  parameters. Here a head has one state, which every token reads and writes.
- block-sparse softmax attention (MoBA, arXiv 2502.13189) in its other layers: a query attends to the few
  blocks of keys whose means fit it best. Here such a layer is ``swa`` or ``attention``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spikelm.activations import sigmoid, silu, softplus
from spikelm.build import Build
from spikelm.kernels.gated_delta import gated_delta
from spikelm.kernels.plan.builder import a_field
from spikelm.mixers.gla import GatedLinearAttention
from spikelm.recurrence import Context, memory_dtype, positions
from spikelm.registry import mixers
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

LARGEST_A = 16.0
"""A lies between 0 and this at the start."""
STEPS = (1e-3, 1e-1)
"""Range of softplus(b) at the start, spread evenly in its logarithm."""
EPSILON = 1e-6
"""Added to the squared length of queries and keys."""


@mixers.register("gated_delta")
class GatedDelta(GatedLinearAttention):
    """Gated delta rule.

    Args:
        build: place in the model.
        allow_negative: whether beta reaches 2 instead of 1.
        short_convolution: tokens mixed by the convolutions after the projections; 0 for SiLU alone.
        output_gate: ``swish`` for a gate on the output, false for none.
        options: heads, qkv_bias, output_norm, rope, rope_theta and qk_norm, see
            :class:`spikelm.mixers.gla.GatedLinearAttention`.

    Raises:
        ConfigError: an unknown output gate, or sizes that do not fit.
    """

    full_precision = ("A_log", "dt_bias")
    column_vectors = ("A_log", "dt_bias")
    """Split over tensor-parallel ranks with the heads."""
    per_head = ("decay", "beta")
    """Projections to one number per head, not to its features."""
    feature_map = "none"

    def __init__(
        self,
        build: Build,
        *,
        allow_negative: bool = False,
        short_convolution: int = 4,
        output_gate: bool | str = "swish",
        **options: Any,
    ) -> None:
        """Projections are drawn by ``spikelm.initialisation``."""
        super().__init__(build, short_convolution=short_convolution, output_gate=output_gate, **options)
        self.strongest = 2.0 if allow_negative else 1.0
        groups = self.key.out_features // self.head_dim
        self.decay = build.projection("decay", build.hidden_size, groups, shard="column")
        self.beta = build.projection("beta", build.hidden_size, groups, shard="column")
        self.A_log = nn.Parameter(_initial_rates(groups))
        self.dt_bias = nn.Parameter(_initial_steps(groups))

    def _activated(self, y: Tensor) -> Tensor:
        return y if self.convolved else silu(y)

    def gate(self, x: Tensor, raw_key: Tensor, state: State, ctx: Context) -> tuple[Tensor | None, State]:
        """Log alpha = -A softplus(W_a x + b), [.., G]."""
        y, new = self.decay(x, state["decay"], ctx)
        memory = memory_dtype(x)
        rate = torch.exp(self.A_log.to(memory))
        return -rate * softplus(y.to(memory) + self.dt_bias.to(memory)), {"decay": new}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, as the equations above say it."""
        position = cast(Tensor, state["position"]) if self.rope is not None else None
        q, k, v, g, beta, new = self._inputs(x, position, state, ctx)
        S = cast(Tensor, state["memory"]).to(k.dtype)  # [B, G, K, V]
        S = torch.exp(g)[..., None, None] * S
        known = torch.einsum("bgk,bgkv->bgv", k, S)
        S = S + torch.einsum("bg,bgk,bgv->bgkv", beta, k, v.to(k.dtype) - known)
        shared = q.unflatten(1, (S.shape[1], -1))  # the query heads of each key-value head
        o = self.head_dim**-0.5 * torch.einsum("bgnk,bgkv->bgnv", shared, S).flatten(1, 2)
        new["memory"] = S
        if position is not None:
            new["position"] = position + 1
        return self._finish(x, o.to(v.dtype), state, new, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: projections, one kernel, one projection."""
        position, last = None, None
        if self.rope is not None:
            position, last = positions(cast(Tensor, state["position"]), ctx, x.shape[1])
        q, k, v, g, beta, new = self._inputs(x, position, state, ctx)
        o, new["memory"] = gated_delta(
            q,
            k,
            v,
            g,
            beta,
            cast(Tensor, state["memory"]),
            scale=self.head_dim**-0.5,
            reset=ctx.reset,
            valid=ctx.valid,
        )
        if last is not None:
            new["position"] = last
        return self._finish(x, o, state, new, ctx)

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token."""
        q, k, v, g = self._lowered_heads(plan, x, state)
        groups, size = k.width // self.head_dim, self.head_dim
        beta = plan.unary("sigmoid", plan.child(self.beta, x, state["beta"]))
        if self.strongest != 1.0:
            beta = plan.scale(beta, self.strongest)
        unit = {}
        for name, heads in (("q", q), ("k", k)):
            unit[name] = plan.register(heads.width)
            plan.record("unit", heads, unit[name], size, heads.width // size, f=(EPSILON,))
        o = plan.register(q.width)
        plan.record(
            "gated_delta",
            unit["q"],
            unit["k"],
            v,
            g,
            beta,
            o,
            q.width // size,
            groups,
            size,
            size,
            a_field(state["memory"]),
            f=(size**-0.5,),
        )
        return self._lowered_finish(plan, x, o, state)

    def lower_gate(self, plan: Builder, x: Register, raw_key: Register, state: Fields) -> Register:
        """-A softplus(W_a x + b)."""
        y = plan.child(self.decay, x, state["decay"])
        g = plan.register(y.width)
        plan.record("rate_gate", y, g, y.width, p=(-torch.exp(self.A_log.float()), self.dt_bias.float()))
        return g

    def _lowered_activation(self, plan: Builder, y: Register) -> Register:
        return y if self.convolved else plan.unary("silu", y)

    def _inputs(
        self, x: Tensor, position: Tensor | None, state: State, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, State]:
        """Unit queries [.., H, K] and keys [.., G, K], values, log alpha and beta [.., G], new states."""
        q, k, v, g, new = self._heads(x, position, state, ctx)
        beta, new["beta"] = self.beta(x, state["beta"], ctx)
        beta = self.strongest * sigmoid(beta.to(memory_dtype(x)))
        return _unit(q), _unit(k), v, cast(Tensor, g), beta, new


def _unit(x: Tensor) -> Tensor:
    """Every head's vector at length 1, in the memory dtype."""
    x = x.to(memory_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def _initial_rates(heads: int) -> Tensor:
    """Log of A, evenly spread between 0 and its largest value (drawn uniformly in the published model)."""
    return torch.log(LARGEST_A * (torch.arange(heads) + 0.5) / heads)


def _initial_steps(heads: int) -> Tensor:
    """b such that softplus(b) is spread evenly in its logarithm, unrelated to A.

    The fractional parts of multiples of the golden ratio are even for any number of heads, and near to no
    order, where a drawn value is independent of A.
    """
    share = (torch.arange(heads) + 0.5) * ((1 + math.sqrt(5)) / 2) % 1.0
    low, high = (math.log(step) for step in STEPS)
    step = torch.exp(low + (high - low) * share)
    return step + torch.log(-torch.expm1(-step))
