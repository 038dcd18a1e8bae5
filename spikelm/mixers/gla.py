"""``gla`` and ``gla_tied``: gated linear attention (arXiv 2312.06635) as in SpikingBrain (arXiv 2509.05276).

Per key-value head, with queries, keys and values from projections of x::

    q, k = phi(W_q x), phi(W_k x);   v = W_v x
    S_t = diag(alpha_t) S_{t-1} + k_t^T v_t                    (GLA, equation 3)
    o_t = K^-1/2 q_t S_t
    y = W_o (norm(o) * swish(W_r x))                           (the second factor with output_gate)

``gla``: alpha = sigmoid(W_2 W_1 x)^(1/16), W_1 of rank 16 and without bias, W_2 with one (GLA, section 4.4),
at the width of the key-value heads: the linear layers of SpikingBrain-7B with phi = ReLU, no output gate, no
rope. ``gla_tied``: phi = sigmoid and alpha = 1 - k, without parameters of its own: the linear branch of
SpikingBrain-76B. log alpha is computed as log sigmoid(-W_k x), which is exact where k rounds to 1.

Order of the options: projection, short convolution, QK norm, phi, rotary positions (after phi, as in
RoFormer's equation 19, arXiv 2104.09864; the tied gate is taken before the rotation).

State: {"memory": [B, G, K, V] for G key-value heads, "position": int64 [B] with rope, the windows
"query_convolution", "key_convolution", "value_convolution" with short_convolution, and the input neurons'
states under the projections' names}.

Deviation: one state per key-value head. The release repeats keys and values for its 28 query heads and keeps
28 states of 128 x 128 per layer; query heads of a group read equal states, so ours keeps 4: the same
mathematics in a seventh of the memory (1.75 MiB -> 256 KiB per layer and sequence in float32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.activations import logsigmoid, sigmoid, silu
from spikelm.build import Build
from spikelm.convolution import ShortConvolution
from spikelm.errors import ConfigError, PlanError, nearest
from spikelm.heads import resolve_heads
from spikelm.kernels.gla import gla
from spikelm.kernels.plan.builder import a_field
from spikelm.recurrence import Context, Part, memory_dtype, positions
from spikelm.registry import mixers
from spikelm.rope import resolve_rope
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

FEATURE_MAPS = ("relu", "sigmoid", "identity", "none")
"""``none`` is another name of ``identity``."""
OUTPUT_GATES = ("swish",)
INPUTS = ("query", "key", "value")


class GatedLinearAttention(Part):
    """What ``gla`` and ``gla_tied`` share: everything but the gate.

    Args:
        build: place in the model.
        num_heads: query heads; see :func:`spikelm.heads.resolve_heads`.
        num_kv_heads: heads of keys, values, gates and states.
        head_dim: features of a head, K = V.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        output_norm: whether every head's output is normalised (RMSNorm).
        output_gate: ``swish`` for a gate on the output, false for none.
        short_convolution: tokens mixed by the convolutions after the projections; 0 for none.
        rope: whether queries and keys carry rotary positions.
        rope_theta: base of the rotation's frequencies.
        qk_norm: whether every head's queries and keys are normalised (RMSNorm) before phi.

    Raises:
        ConfigError: an unknown output gate, or sizes that do not fit.
    """

    feature_map: str
    """phi of queries and keys."""

    def __init__(
        self,
        build: Build,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        output_norm: bool = True,
        output_gate: bool | str = False,
        short_convolution: int = 0,
        rope: bool = False,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
    ) -> None:
        """Projections are drawn by ``spikelm.initialisation``."""
        super().__init__()
        if output_gate is True or isinstance(output_gate, str) and output_gate not in OUTPUT_GATES:
            raise ConfigError(f"output_gate is {output_gate!r}; expected 'swish', or false for none")
        D = build.hidden_size
        heads = resolve_heads(build, num_heads, num_kv_heads, head_dim)
        self.head_dim = heads.dim
        self.rope = resolve_rope(heads.dim, theta=rope_theta) if rope else None
        widths = {"query": heads.num * heads.dim, "key": heads.kv * heads.dim, "value": heads.kv * heads.dim}
        self.query = build.projection("query", D, widths["query"], bias=qkv_bias, shard="column")
        self.key = build.projection("key", D, widths["key"], bias=qkv_bias, shard="column")
        self.value = build.projection("value", D, widths["value"], bias=qkv_bias, shard="column")
        self.output = build.projection("output", widths["query"], D, shard="row")
        self.output_gate = (
            build.projection("output_gate", D, widths["query"], shard="column") if output_gate else None
        )
        self.output_norm = build.rms_norm(heads.dim) if output_norm else None
        self.query_norm = build.rms_norm(heads.dim) if qk_norm else None
        self.key_norm = build.rms_norm(heads.dim) if qk_norm else None
        self.convolved = short_convolution != 0
        if self.convolved:
            self.query_convolution = ShortConvolution(widths["query"], short_convolution)
            self.key_convolution = ShortConvolution(widths["key"], short_convolution)
            self.value_convolution = ShortConvolution(widths["value"], short_convolution)

    def gate(self, x: Tensor, raw_key: Tensor, state: State, ctx: Context) -> tuple[Tensor | None, State]:
        """Log gates [.., G, K] (or [.., G, 1], or None) in the memory dtype, and its children's new states.

        Args:
            x: input of the mixer, [.., D].
            raw_key: keys before the feature map, [.., G, K].
            state: of the mixer.
            ctx: context.
        """
        raise NotImplementedError

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """Empty matrices, no tokens."""
        dtype = dtype or torch.float32
        groups, size = self.key.out_features // self.head_dim, self.head_dim
        state: State = {"memory": torch.zeros(batch, groups, size, size, device=device, dtype=dtype)}
        if self.rope is not None:
            state["position"] = torch.zeros(batch, dtype=torch.int64, device=device)
        for name, child in self.named_children():
            if isinstance(child, Part):
                state[name] = child.init_state(batch, device, dtype, max_len)
        return state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, as the equations above say it."""
        position = cast(Tensor, state["position"]) if self.rope is not None else None
        q, k, v, g, new = self._heads(x, position, state, ctx)
        memory = memory_dtype(x)
        S = cast(Tensor, state["memory"]).to(memory)  # [B, G, K, V]
        if g is not None:
            S = torch.exp(g)[..., None] * S
        S = S + k.to(memory)[..., :, None] * v.to(memory)[..., None, :]
        shared = q.to(memory).unflatten(1, (S.shape[1], -1))  # the query heads of each key-value head
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
        q, k, v, g, new = self._heads(x, position, state, ctx)
        o, new["memory"] = gla(
            q,
            k,
            v,
            g,
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
        o = plan.register(q.width)
        plan.record(
            "gla",
            q,
            k,
            v,
            g,
            o,
            q.width // size,
            groups,
            size,
            size,
            a_field(state["memory"]),
            f=(size**-0.5,),
        )
        return self._lowered_finish(plan, x, o, state)

    def _lowered_heads(
        self, plan: Builder, x: Register, state: Fields
    ) -> tuple[Register, Register, Register, Register]:
        """Queries, keys, values and log gates of one token."""
        found = []
        for name in INPUTS:
            y = plan.child(getattr(self, name), x, state[name])
            if self.convolved:
                key = f"{name}_convolution"
                y = plan.child(getattr(self, key), y, state[key])
            found.append(self._lowered_activation(plan, y))
        q, k, v = found
        if self.query_norm is not None and self.key_norm is not None:
            q = plan.norm(self.query_norm, q, q.width // self.head_dim)
            k = plan.norm(self.key_norm, k, k.width // self.head_dim)
        g = self.lower_gate(plan, x, k, state)
        q, k = self._lowered_map(plan, q), self._lowered_map(plan, k)
        if self.rope is not None:
            self.rope.lower(plan, q, k, self.head_dim, state["position"], advance=True)
        return q, k, v, g

    def lower_gate(self, plan: Builder, x: Register, raw_key: Register, state: Fields) -> Register:
        """Records of :meth:`gate`.

        Args:
            plan: what they are added to.
            x: input of the mixer.
            raw_key: keys before the feature map.
            state: of the mixer.
        """
        raise PlanError(f"{self.path or type(self).__name__} has a gate() without a lower_gate()")

    def _lowered_activation(self, plan: Builder, y: Register) -> Register:
        return y

    def _lowered_map(self, plan: Builder, x: Register) -> Register:
        if self.feature_map == "relu":
            return plan.relu(x)
        return plan.unary("sigmoid", x) if self.feature_map == "sigmoid" else x

    def _lowered_finish(self, plan: Builder, x: Register, o: Register, state: Fields) -> Register:
        if self.output_norm is not None:
            o = plan.norm(self.output_norm, o, o.width // self.head_dim)
        if self.output_gate is not None:
            o = plan.swish(plan.child(self.output_gate, x, state["output_gate"]), o)
        return plan.child(self.output, o, state["output"])

    def _heads(
        self, x: Tensor, position: Tensor | None, state: State, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, State]:
        """Queries [.., H, K], keys and values [.., G, K], log gates, and the new states of their children."""
        new: State = {}
        found = []
        for name in INPUTS:
            y, new[name] = getattr(self, name)(x, state[name], ctx)
            if self.convolved:
                key = f"{name}_convolution"
                y, new[key] = getattr(self, key)(y, state[key], ctx)
            found.append(self._activated(y).unflatten(-1, (-1, self.head_dim)))
        q, k, v = found
        q, k = _normalised(self.query_norm, q), _normalised(self.key_norm, k)
        g, gates = self.gate(x, k, state, ctx)
        q, k = self._map(q), self._map(k)
        if self.rope is not None and position is not None:
            q, k = self.rope.rotate(q, position), self.rope.rotate(k, position)
        return q, k, v, g, {**new, **gates}

    def _activated(self, y: Tensor) -> Tensor:
        """What follows the projection and the convolution of queries, keys and values; nothing here."""
        return y

    def _map(self, x: Tensor) -> Tensor:
        if self.feature_map == "relu":
            return F.relu(x)
        return sigmoid(x) if self.feature_map == "sigmoid" else x

    def _finish(self, x: Tensor, o: Tensor, state: State, new: State, ctx: Context) -> tuple[Tensor, State]:
        """From the heads' outputs [.., H, V] to the mixer's [.., D]."""
        y = _normalised(self.output_norm, o).flatten(-2)
        if self.output_gate is not None:
            r, new["output_gate"] = self.output_gate(x, state["output_gate"], ctx)
            y = y * silu(r)
        out, new["output"] = self.output(y, state["output"], ctx)
        return out, new


@mixers.register("gla")
class GLA(GatedLinearAttention):
    """Gated linear attention with its own gate.

    Args:
        build: place in the model.
        feature_map: phi of queries and keys: ``relu``, ``sigmoid`` or ``identity``.
        gate_rank: features between the two matrices of the gate; None for a single matrix ``gate_high`` (the
            merged form of quantised releases).
        gate_divisor: the log of the sigmoid is divided by it, so that memories start long.
        options: see :class:`GatedLinearAttention`.

    Raises:
        ConfigError: an unknown feature map, a rank below 1 or a divisor that is not positive.
    """

    def __init__(
        self,
        build: Build,
        *,
        feature_map: str = "relu",
        gate_rank: int | None = 16,
        gate_divisor: float = 16.0,
        **options: Any,
    ) -> None:
        """See :class:`GatedLinearAttention`."""
        super().__init__(build, **options)
        if feature_map not in FEATURE_MAPS:
            raise ConfigError(nearest("feature_map", feature_map, FEATURE_MAPS))
        self.feature_map = feature_map
        if gate_rank is not None and gate_rank < 1:
            raise ConfigError(f"gate_rank is {gate_rank}; expected at least 1, or null for one full matrix")
        if gate_divisor <= 0:
            raise ConfigError(f"gate_divisor is {gate_divisor}; expected a positive number")
        self.gate_divisor = gate_divisor
        D, width = build.hidden_size, self.key.out_features
        self.gate_low = None if gate_rank is None else build.projection("gate_low", D, gate_rank)
        self.gate_high = build.projection("gate_high", gate_rank or D, width, bias=True, shard="column")

    def gate(self, x: Tensor, raw_key: Tensor, state: State, ctx: Context) -> tuple[Tensor | None, State]:
        """Log alpha = log sigmoid(W_2 W_1 x) / divisor."""
        new: State = {}
        if self.gate_low is not None:
            x, new["gate_low"] = self.gate_low(x, state["gate_low"], ctx)
        y, new["gate_high"] = self.gate_high(x, state["gate_high"], ctx)
        log_alpha = logsigmoid(y.to(memory_dtype(y))) / self.gate_divisor
        return log_alpha.unflatten(-1, (-1, self.head_dim)), new

    def lower_gate(self, plan: Builder, x: Register, raw_key: Register, state: Fields) -> Register:
        """Log sigmoid(W_2 W_1 x) / divisor."""
        if self.gate_low is not None:
            x = plan.child(self.gate_low, x, state["gate_low"])
        return plan.log_gate(plan.child(self.gate_high, x, state["gate_high"]), 1.0, self.gate_divisor)


@mixers.register("gla_tied")
class TiedGLA(GatedLinearAttention):
    """Gated linear attention whose gate is 1 - k.

    Args:
        build: place in the model.
        options: see :class:`GatedLinearAttention`; the feature map is the sigmoid.
    """

    feature_map = "sigmoid"

    def gate(self, x: Tensor, raw_key: Tensor, state: State, ctx: Context) -> tuple[Tensor | None, State]:
        """Log (1 - sigmoid(z)) = log sigmoid(-z), exact for any z."""
        return logsigmoid(-raw_key.to(memory_dtype(raw_key))), {}

    def lower_gate(self, plan: Builder, x: Register, raw_key: Register, state: Fields) -> Register:
        """Log sigmoid(-z)."""
        return plan.log_gate(raw_key, -1.0, 1.0)


def _normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    """RMSNorm of every head, x [.., H, K], computed in the dtype of its weights."""
    if norm is None:
        return x
    return cast(Tensor, norm(x.to(cast(Tensor, norm.weight).dtype))).to(x.dtype)
