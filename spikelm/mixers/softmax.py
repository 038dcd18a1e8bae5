"""What ``swa`` and ``attention`` share: softmax attention whose past stands in a ring of slots.

For the token at position p (0 at the start of a document), with rotary positions R::

    q, k, v = W_q x, W_k x, W_v x;   q, k = norm(q), norm(k) (qk_norm);   q, k = R_p q, R_p k (rope)
    slot p mod R of the ring <- k, v
    o = sum_s softmax_s(q k_s / sqrt(d)) v_s    over the ring and the sinks
    y = W_o (o * sigmoid(W_g x))                (the gate only with output_gate)

State: {"keys": [B, R, G, d], "values": [B, R, G, d], "position": int64 [B], valid tokens of the document so
far} and those of the projections; in a model with n sink tokens "sink_keys" and "sink_values" [B, n, G, d].
Keys are stored rotated; slots that hold no token of this document are zero. Sinks have the rotary positions
0 to n - 1, the text begins at n; they take no slot and are counted neither as position nor in the window.
A part of a model with sinks must see them first (``ctx.sinks``), as the model's ``init_state`` arranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from spikelm.activations import sigmoid
from spikelm.attend import attend, attend_all, attend_one
from spikelm.build import Build
from spikelm.errors import ShapeError
from spikelm.heads import resolve_heads
from spikelm.kernels.plan.builder import a_field
from spikelm.recurrence import Context, Part, compacted, initial_like, positions, zero_invalid
from spikelm.rope import resolve_rope
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

PROJECTIONS = ("query", "key", "value", "output_gate", "output")


class SoftmaxMixer(Part):
    """Softmax attention over a ring.

    Args:
        build: place in the model.
        num_heads: query heads; see :func:`spikelm.heads.resolve_heads` for what is left out.
        num_kv_heads: key and value heads.
        head_dim: features of a head.
        qkv_bias: whether query, key and value have a bias.
        output_bias: whether the output has one.
        qk_norm: RMSNorm over every query and key head, before the rotation.
        output_gate: whether a sigmoid gate of x stands before the output.
        rope: whether positions are rotary; without it the part knows the order of tokens by the mask only.
        rope_theta: base of the rotation.
        rope_scaling: see :func:`spikelm.rope.resolve_rope`.
        partial_rotary_factor: share of the features that is rotated.
    """

    def __init__(
        self,
        build: Build,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
        output_gate: bool = False,
        rope: bool = True,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        partial_rotary_factor: float = 1.0,
    ) -> None:
        """Build the projections."""
        super().__init__()
        D, heads = build.hidden_size, resolve_heads(build, num_heads, num_kv_heads, head_dim)
        self.head_dim, self.sinks = heads.dim, build.sink_tokens
        wide, narrow = heads.num * heads.dim, heads.kv * heads.dim
        self.query = build.projection("query", D, wide, qkv_bias, shard="column")
        self.key = build.projection("key", D, narrow, qkv_bias, shard="column")
        self.value = build.projection("value", D, narrow, qkv_bias, shard="column")
        self.output_gate = build.projection("output_gate", D, wide, shard="column") if output_gate else None
        self.output = build.projection("output", wide, D, output_bias, shard="row")
        self.query_norm = build.rms_norm(heads.dim) if qk_norm else None
        self.key_norm = build.rms_norm(heads.dim) if qk_norm else None
        self.rope = None
        if rope:
            self.rope = resolve_rope(
                heads.dim,
                theta=rope_theta,
                scaling=rope_scaling,
                partial_rotary_factor=partial_rotary_factor,
            )

    def slots(self, max_len: int | None) -> int:
        """R, slots of the ring of a new state."""
        raise NotImplementedError

    def check_room(self, last: Tensor, room: int) -> None:
        """Refuse positions up to ``last`` (int64 [B], the number after the call) in a ring of ``room``."""

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """An empty ring at position 0."""
        groups = self.key.out_features // self.head_dim
        dtype = dtype or torch.float32

        def zeros(length: int) -> Tensor:
            return torch.zeros(batch, length, groups, self.head_dim, device=device, dtype=dtype)

        room = self.slots(max_len)
        state: State = {"keys": zeros(room), "values": zeros(room)}
        state["position"] = torch.zeros(batch, dtype=torch.int64, device=device)
        if self.sinks:
            state["sink_keys"], state["sink_values"] = zeros(self.sinks), zeros(self.sinks)
        for name, child in self._projections():
            state[name] = child.init_state(batch, device, dtype, max_len)
        return state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, as the equations above say it."""
        if ctx.sinks:
            y, state = self._sink_prefix(x[:, None], state, ctx)
            return y[:, 0], state
        position = cast(Tensor, state["position"])
        keys, values = cast(Tensor, state["keys"]), cast(Tensor, state["values"])
        static = ctx.static or torch.compiler.is_compiling()
        if not static:
            self.check_room(position + 1, keys.shape[1])
        q, k, v, new = self._heads(x, position + self.sinks, state, ctx)
        slot = (position % keys.shape[1])[:, None, None, None].expand(-1, 1, *k.shape[1:])
        new["keys"] = keys = keys.scatter(1, slot, k[:, None].to(keys.dtype))
        new["values"] = values = values.scatter(1, slot, v[:, None].to(values.dtype))
        new["position"] = position + 1
        filled = keys.shape[1] if static else min(int(position.max()) + 1, keys.shape[1])
        keys, values = keys[:, :filled], values[:, :filled]
        visible = torch.arange(filled, device=x.device) <= position[:, None]
        if self.sinks:
            keys = torch.cat([cast(Tensor, state["sink_keys"]), keys], 1)
            values = torch.cat([cast(Tensor, state["sink_values"]), values], 1)
            visible = torch.cat([visible.new_ones(len(x), self.sinks), visible], 1)
        o = attend_one(q.to(keys.dtype), keys, values, visible).to(q.dtype)
        return self._close(x, o, state, new, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens, in blocks of queries."""
        if ctx.sinks:
            return self._sink_prefix(x, state, ctx)
        if x.shape[1] == 1 and ctx.reset is None and ctx.valid is None:
            y, state = self.step(x[:, 0], state, ctx.at(0))
            return y[:, None], state
        return compacted(self._packed, x, state, ctx, lambda: initial_like(self, x, state))

    def _packed(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens of which the invalid ones stand at the right end."""
        ring = cast(Tensor, state["keys"]), cast(Tensor, state["values"])
        last, room, T = cast(Tensor, state["position"]), ring[0].shape[1], x.shape[1]
        position, after = positions(last, ctx, T)
        count = after.new_full(after.shape, T) if ctx.valid is None else ctx.valid.sum(1)
        static = ctx.static or torch.compiler.is_compiling()
        if not static:
            self.check_room((position + (1 if ctx.valid is None else ctx.valid.long())).amax(1), room)
        q, k, v, new = self._heads(x, position + self.sinks, state, ctx)
        # Of the ring what some row has filled, or all of it where nobody may look; in order of time, the
        # newest at the right.
        past = room if static else min(int(last.max()), room)
        order = (last[:, None] - past + torch.arange(past, device=x.device)) % room
        kept = [
            torch.cat([_columns(old, order).to(now.dtype), now], 1)
            for old, now in zip(ring, (k, v), strict=True)
        ]
        own = past + torch.arange(T, device=x.device)
        first = own - position.clamp(max=room - 1)
        o = attend(q, kept[0], kept[1], first, self._pinned(state, q.dtype), room - 1 if static else None)
        # Slot s holds the newest position that is s modulo R, `back` columns before the last valid token.
        slot = torch.arange(room, device=x.device)
        back = (after[:, None] - 1 - slot) % room
        held = (back < after[:, None])[..., None, None]
        column = (past + count[:, None] - 1 - back).clamp(min=0)
        for name, old, row in zip(("keys", "values"), ring, kept, strict=True):
            new[name] = torch.where(held, _columns(row, column).to(old.dtype), old.new_zeros(()))
        new["position"] = after
        return self._close(x, o, state, new, ctx)

    def _sink_prefix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """The model's sinks x [B, n, D]: they see each other, and stay visible to every later token."""
        if x.shape[1] != self.sinks or ctx.reset is not None or ctx.valid is not None:
            raise ShapeError(
                f"{self.path or type(self).__name__} got a sink prefix of {x.shape[1]} tokens; expected "
                f"{self.sinks}, the model's sink_tokens, without reset and valid"
            )
        place = torch.arange(self.sinks, device=x.device).expand(len(x), -1)
        q, k, v, new = self._heads(x, place, state, ctx)
        memory = cast(Tensor, state["keys"]).dtype
        kept = {"sink_keys": k.to(memory), "sink_values": v.to(memory)}
        y, new = self._close(x, attend_all(q, k, v), state, new, ctx)
        return y, {**state, **new, **kept}

    def _heads(
        self, x: Tensor, place: Tensor, state: State, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Query, key and value heads of x at rotary positions ``place``; zero at invalid tokens."""
        new: State = {}
        heads = []
        for name, norm in (("query", self.query_norm), ("key", self.key_norm), ("value", None)):
            y, new[name] = getattr(self, name)(x, state[name], ctx)
            if y.dim() == 3:
                y = zero_invalid(y, ctx)
            y = y.unflatten(-1, (-1, self.head_dim))
            heads.append(y if norm is None else norm(y.to(norm.weight.dtype)).to(y.dtype))
        q, k, v = heads
        if self.rope is not None:
            q, k = self.rope.rotate(q, place), self.rope.rotate(k, place)
        return q, k, v, new

    def _close(self, x: Tensor, o: Tensor, state: State, new: State, ctx: Context) -> tuple[Tensor, State]:
        """Gate and output projection of the heads' outputs o [.., H, d]; the complete new state."""
        o = o.flatten(-2)
        if o.dim() == 3:
            o = zero_invalid(o, ctx)
        if self.output_gate is not None:
            gate, new["output_gate"] = self.output_gate(x, cast(State, state["output_gate"]), ctx)
            o = o * sigmoid(gate)
        y, new["output"] = self.output(o, cast(State, state["output"]), ctx)
        return y, {name: new.get(name, value) for name, value in state.items()}

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token; the sinks are in the state already."""
        q, k, v = (plan.child(getattr(self, name), x, state[name]) for name in ("query", "key", "value"))
        heads, groups = q.width // self.head_dim, k.width // self.head_dim
        if self.query_norm is not None and self.key_norm is not None:
            q, k = plan.norm(self.query_norm, q, heads), plan.norm(self.key_norm, k, groups)
        if self.rope is not None:
            self.rope.lower(plan, q, k, self.head_dim, state["position"], self.sinks)
        keys, values, position = (a_field(state[name]) for name in ("keys", "values", "position"))
        if self.grows:
            room = keys.shape[0]
            plan.limit(position, room, partial(self.check_room, torch.tensor([room + 1]), room))
        pinned = [a_field(state[f"sink_{name}"]) if self.sinks else -1 for name in ("keys", "values")]
        shape = torch.tensor([heads, groups, self.head_dim, keys.shape[0], self.sinks], dtype=torch.int64)
        o = plan.register(q.width)
        plan.record(
            "attend",
            q,
            k,
            v,
            o,
            plan.register(2 * heads),
            keys,
            values,
            position,
            *pinned,
            f=(self.head_dim**-0.5,),
            p=(plan.keep(shape).data_ptr(),),
        )
        if self.output_gate is not None:
            o = plan.gate(plan.child(self.output_gate, x, state["output_gate"]), o)
        return plan.child(self.output, o, state["output"])

    def _pinned(self, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if not self.sinks:
            return None
        return cast(Tensor, state["sink_keys"]).to(dtype), cast(Tensor, state["sink_values"]).to(dtype)

    def _projections(self) -> list[tuple[str, Part]]:
        found = ((name, getattr(self, name)) for name in PROJECTIONS)
        return [(name, child) for name, child in found if child is not None]


def _columns(row: Tensor, index: Tensor) -> Tensor:
    """Columns ``index`` [B, N] of row [B, S, G, d]."""
    return row.take_along_dim(index[..., None, None], 1)
