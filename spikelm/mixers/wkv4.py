"""``wkv4``: the time mix of RWKV-4 (arXiv 2305.13048, equations 11 to 18), as SpikeGPT uses it.

Token shift, then key, value and receptance; an exponentially decaying average of the values weighted by
exp(key), with decay w = exp(-exp(time_decay)) per channel and a bonus u = time_first for the current token::

    y_t = (e^{p - q} a + e^{u + k_t - q} v_t) / (e^{p - q} b + e^{u + k_t - q}),   q = max(p, u + k_t)
    out = W_o (sigmoid(r) * y)

State: {"shift": [B, D], "wkv": [B, 3, D] (numerator a, denominator b, exponent p), and the input neurons'
states under "key", "value", "receptance", "output"}. Deviations: none; the state is kept in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from spikelm.activations import lerp, sigmoid
from spikelm.build import Build
from spikelm.kernels.plan.builder import a_field
from spikelm.kernels.wkv4 import wkv4
from spikelm.recurrence import EMPTY, Context, Part, memory_dtype, token_shift
from spikelm.registry import mixers
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

EMPTY_EXPONENT = -1e38
"""Exponent p of an empty average: any key is larger."""


@mixers.register("wkv4")
class WKV4(Part):
    """RWKV-4 time mix.

    Args:
        build: place in the model.
    """

    full_precision = ("time_decay", "time_first")
    column_vectors = ("time_decay", "time_first")

    def __init__(self, build: Build) -> None:
        """Parameters are set by ``spikelm.initialisation``."""
        super().__init__()
        D = build.hidden_size
        self.hidden_size = D
        self.layer_fraction = build.layer / max(build.num_layers - 1, 1)
        self.depth_left = 1.0 - build.layer / build.num_layers
        self.time_decay = nn.Parameter(torch.zeros(D))
        self.time_first = nn.Parameter(torch.zeros(D))
        self.mix_k = nn.Parameter(torch.ones(D))
        self.mix_v = nn.Parameter(torch.ones(D))
        self.mix_r = nn.Parameter(torch.ones(D))
        self.key = build.projection("key", D, D, shard="column")
        self.value = build.projection("value", D, D, shard="column")
        self.receptance = build.projection("receptance", D, D, shard="column")
        self.output = build.projection("output", D, D, shard="row")

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """No previous token, an empty average."""
        dtype = dtype or torch.float32
        wkv = torch.zeros(batch, 3, self.key.out_features, device=device, dtype=dtype)
        wkv[:, 2] = EMPTY_EXPONENT
        shift = torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)
        state: State = {"shift": shift, "wkv": wkv}
        for name in ("key", "value", "receptance", "output"):
            child = cast(Part, getattr(self, name))
            state[name] = child.init_state(batch, device, dtype, max_len)
        return state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, as the equations above say it."""
        last = cast(Tensor, state["shift"]).to(x.dtype)
        k, v, r, new = self._project(x, last, state, ctx)
        memory = memory_dtype(x)
        if not torch.is_grad_enabled():
            # The equations below in the kernel of sequences, so that a step has the same bits.
            y, new["wkv"] = self._recur(k[:, None], v[:, None], state, EMPTY)
            new["shift"] = x.to(memory)
            out, new["output"] = self.output(sigmoid(r) * y[:, 0].to(r.dtype), state["output"], ctx)
            return out, new
        a, b, p = cast(Tensor, state["wkv"]).to(memory).unbind(1)
        u, decay = self.time_first.to(memory), -torch.exp(self.time_decay.to(memory))
        k, v = k.to(memory), v.to(memory)
        p = p.detach()  # the exponents only scale: gradients are those of a and b at a fixed scale
        q = torch.maximum(p, u + k).detach()
        past, now = torch.exp(p - q), torch.exp(u + k - q)
        y = (past * a + now * v) / (past * b + now)
        q = torch.maximum(p + decay, k).detach()
        past, now = torch.exp(p + decay - q), torch.exp(k - q)
        new["wkv"] = torch.stack([past * a + now * v, past * b + now, q], 1)
        new["shift"] = x.to(memory)
        out, new["output"] = self.output(sigmoid(r) * y.to(r.dtype), state["output"], ctx)
        return out, new

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: three products, one kernel, one product."""
        previous, shift = token_shift(x, cast(Tensor, state["shift"]), ctx)
        k, v, r, new = self._project(x, previous, state, ctx)
        y, new["wkv"] = self._recur(k, v, state, ctx)
        new["shift"] = shift
        out, new["output"] = self.output(sigmoid(r) * y, state["output"], ctx)
        return out, new

    def _recur(self, k: Tensor, v: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor]:
        wkv = cast(Tensor, state["wkv"])
        return wkv4(self.time_decay, self.time_first, k, v, wkv, reset=ctx.reset, valid=ctx.valid)

    def _project(
        self, x: Tensor, previous: Tensor, state: State, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        new: State = {}
        k, new["key"] = self.key(lerp(previous, x, self.mix_k), state["key"], ctx)
        v, new["value"] = self.value(lerp(previous, x, self.mix_v), state["value"], ctx)
        r, new["receptance"] = self.receptance(lerp(previous, x, self.mix_r), state["receptance"], ctx)
        return k, v, r, new

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token."""
        mixes = [self.mix_k, self.mix_v, self.mix_r]
        to_key, to_value, to_receptance = plan.shift(x, state["shift"], mixes)
        k = plan.child(self.key, to_key, state["key"])
        v = plan.child(self.value, to_value, state["value"])
        r = plan.child(self.receptance, to_receptance, state["receptance"])
        y = plan.register(v.width)
        decay = -torch.exp(self.time_decay.detach())
        plan.record("wkv4", k, v, y, a_field(state["wkv"]), v.width, p=(decay, self.time_first))
        return plan.child(self.output, plan.gate(r, y), state["output"])
