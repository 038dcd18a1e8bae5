"""What the spiking attentions ``ssa`` and ``sdsa`` share: spikes in, sums of spikes over the past, output.

x -> projection -> norm -> neuron for each of query, key and value: what meets is 0 or 1; there is no softmax.
The past is a sum of spikes M per head, which a subclass writes with k_t^T v_t and reads with q_t::

    M_t = a M_{t-1} + k_t^T v_t        a = 1: a count, by additions only; else decay
    n_t = a n_{t-1} + 1                tokens that count, the same decay
    o_t = scale * q_t M_t / n_t        mean; without: scale * q_t M_t

The mean is not in the papers: they sum over the 196 patches of an image and scale by 0.125 once; over a text
the sum grows with the position until every neuron behind it fires always. Dividing by n_t needs no division:
o_t reaches a threshold where scale * q_t M_t reaches n_t thresholds.

``causal: false`` sums over the whole document instead (the papers' form, for encoders); resets separate
documents.

State: {"memory": [B, H, K, V], "count": [B, H] (with mean), "shift": [B, D] (with token_shift), and those of
the projections and neurons under "query", "query_neuron", ..., "output"}; float32 (float64 for float64).
Without decay memory and count are integers, exact until a sum reaches 2**24 (2**53): see
``docs/spikformer.md``. Without ``causal`` there is no memory: the neurons, which do run along the tokens,
keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spikelm.activations import lerp
from spikelm.block import fire, lower_fire
from spikelm.build import Build
from spikelm.errors import ConfigError, PlanError
from spikelm.heads import resolve_heads
from spikelm.kernels.gla import gla
from spikelm.kernels.plan.builder import a_field
from spikelm.neurons.base import Neuron, build_neuron
from spikelm.norms import behind_spikes
from spikelm.recurrence import Context, Part, memory_dtype, token_shift
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

NEURON: Mapping[str, Any] = {"name": "plif", "tau": 2.0, "threshold": 0.5, "detach_reset": True}
"""Neuron behind query, key and value unless the configuration names one."""

FASTEST, SLOWEST = 1, 8
"""Exponents n of the decays 1 - 2**-n of the first and the last head."""


class SpikingAttention(Part):
    """Base of the spiking attentions.

    Args:
        build: place in the model.
        num_heads: heads; see :func:`spikelm.heads.resolve_heads`.
        head_dim: features of a head.
        neuron: behind query, key and value; binary. None: ``plif`` with threshold 0.5 where the inputs of the
            projections are spikes, and none where they are not (continuous twins, ``placement: after``).
        attention_neuron: what the sum passes through; None as the subclass says.
        norm: whether a norm over the features of the token stands before those neurons, where the papers have
            BatchNorm.
        causal: false sums over the whole document.
        decay: None (a = 1), ``fixed`` (1 - 2**-n, n from 1 to 8 over the heads: shifts and additions), or
            ``learned`` per head from there.
        mean: whether the sum is divided by the tokens in it.
        scale: factor of the sum; the papers have 0.125 without mean.
        token_shift: whether the projections see a learned mixture of this token and the one before (RWKV's
            token shift, a causal convolution of width 2, in place of the papers' positional convolution).

    Raises:
        ConfigError: sizes, a neuron or a decay that do not fit.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the input is projected to; names of projections."""
        return ("query", "key", "value")

    def __init__(
        self,
        build: Build,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        neuron: Mapping[str, Any] | None = None,
        attention_neuron: Mapping[str, Any] | None = None,
        norm: bool = True,
        causal: bool = True,
        decay: str | None = None,
        mean: bool = True,
        scale: float = 1.0,
        token_shift: bool = False,
    ) -> None:
        """Build projections, norms and neurons."""
        super().__init__()
        D, heads = build.hidden_size, resolve_heads(build, num_heads, None, head_dim)
        self.hidden_size, self.num_heads, self.head_dim = D, heads.num, heads.dim
        width = heads.num * heads.dim
        self.causal, self.mean, self.scale = causal, mean, float(scale)
        self._check(build, decay)
        for name in self.inputs:
            # No shard: the norm and the neurons look at all heads.
            self.add_module(name, build.projection(name, D, width))
            self.add_module(f"{name}_norm", behind_spikes(build.norm(width)) if norm else nn.Identity())
        spiking = cast(Neuron, self.get_submodule(f"{self.inputs[0]}.neuron")).spiking
        for name in self.inputs:
            self.add_module(f"{name}_neuron", self._binary(neuron, NEURON if spiking else None, width))
        self.attention_neuron = self._binary(attention_neuron, self._usual(spiking), width)
        self.output = build.projection("output", width, D)
        self.decay = decay
        self.decay_logit = None
        if decay == "learned":
            self.full_precision = ("decay_logit",)
            self.decay_logit = nn.Parameter(torch.log(2.0 ** _exponents(heads.num) - 1.0))
        self.token_shift = token_shift
        if token_shift:
            mixture = (torch.arange(D) / D) ** (1.0 - build.layer / build.num_layers)
            for name in self.inputs:
                self.register_parameter(f"mix_{name}", nn.Parameter(mixture.clone()))

    def _usual(self, spiking: bool) -> Mapping[str, Any] | None:
        """The attention neuron where the configuration names none."""
        return None

    def _check(self, build: Build, decay: str | None) -> None:
        if decay not in (None, "fixed", "learned"):
            raise ConfigError(f"decay is {decay!r}; expected fixed, learned or null")
        if not self.scale > 0:
            raise ConfigError(f"scale is {self.scale}; expected a positive number")
        if not self.causal and decay is not None:
            raise ConfigError("decay needs an order of the tokens; leave it out with causal: false")
        if not self.causal and build.sink_tokens:
            raise ConfigError(
                "sink tokens reach a text through memory, which causal: false lacks; set sink_tokens to 0"
            )

    @staticmethod
    def _binary(given: Mapping[str, Any] | None, usual: Mapping[str, Any] | None, width: int) -> Neuron:
        spec = given or usual or {"name": "none"}
        neuron = build_neuron(spec, width)
        if neuron.spiking and not neuron.binary:
            raise ConfigError(
                f"neuron {spec['name']!r} sends counts; spiking attention adds spikes that are 0 or 1: use "
                "lif, plif, if or heaviside"
            )
        return neuron

    def _operands(self, spikes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """What reads (q [.., H, K]), addresses (k [.., H, K]) and is added up (v [.., H, V])."""
        raise NotImplementedError

    def _finish(
        self, o: Tensor, spikes: tuple[Tensor, ...], state: State, ctx: Context
    ) -> tuple[Tensor, State]:
        """From what was read, [.., H, V], to the input of the output projection [.., H V]."""
        raise NotImplementedError

    def _key_dim(self) -> int:
        """K of the memory."""
        return self.head_dim

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """Nothing seen: sums of zero, neurons at rest."""
        dtype = dtype or torch.float32
        state: State = {}
        for name in self._children():
            state[name] = cast(Part, self.get_submodule(name)).init_state(batch, device, dtype, max_len)
        H = self.num_heads
        if self.causal:
            state["memory"] = torch.zeros(
                batch, H, self._key_dim(), self.head_dim, device=device, dtype=dtype
            )
            if self.mean:
                state["count"] = torch.zeros(batch, H, device=device, dtype=dtype)
        if self.token_shift:
            state["shift"] = torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)
        return state

    def _children(self) -> tuple[str, ...]:
        neurons = tuple(f"{name}_neuron" for name in self.inputs)
        return (*self.inputs, *neurons, "attention_neuron", "output")

    def log_decay(self, like: Tensor) -> Tensor | None:
        """Log of a per head, [H], in the dtype and on the device of ``like``; None for a = 1."""
        if self.decay is None:
            return None
        if self.decay_logit is not None:
            return nn.functional.logsigmoid(self.decay_logit.to(like.dtype))
        return torch.log1p(-(2.0 ** -_exponents(self.num_heads, like)))

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, as the equations above say it."""
        if not self.causal:
            return super().step(x, state, ctx)
        new: State = {}
        previous = x
        if self.token_shift:
            previous, new["shift"] = cast(Tensor, state["shift"]).to(x.dtype), x.to(memory_dtype(x))
        spikes = self._spikes(x, previous, state, new, ctx)
        q, k, v = (operand.to(memory_dtype(x)) for operand in self._operands(spikes))
        log_decay = self.log_decay(q)
        kept = q.new_ones(()) if log_decay is None else torch.exp(log_decay)
        memory = kept[..., None, None] * cast(Tensor, state["memory"]).to(q.dtype)
        memory = memory + k[..., :, None] * v[..., None, :]
        new["memory"] = memory
        o = (q[..., :, None] * memory).sum(-2)
        count = None
        if self.mean:
            new["count"] = count = kept * cast(Tensor, state["count"]).to(q.dtype) + 1.0
        return self._output(o, count, spikes, state, new, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: the projections on all of them, sums as matrix products."""
        new: State = {}
        previous = x
        if self.token_shift:
            previous, new["shift"] = token_shift(x, cast(Tensor, state["shift"]), ctx)
        spikes = self._spikes(x, previous, state, new, ctx)
        q, k, v = (operand.to(memory_dtype(x)) for operand in self._operands(spikes))
        one = q.new_ones(*q.shape[:-1], 1)
        count = None
        if self.causal:
            log_decay = self.log_decay(q)
            g = None if log_decay is None else log_decay[:, None].expand_as(one)
            masks = {"reset": ctx.reset, "valid": ctx.valid}
            o, new["memory"] = gla(q, k, v, g, cast(Tensor, state["memory"]), scale=1.0, **masks)
            if self.mean:
                counted = cast(Tensor, state["count"])[..., None, None]
                count, counted = gla(one, one, one, g, counted, scale=1.0, **masks)
                count, new["count"] = count[..., 0], counted[..., 0, 0]
        else:
            o = over_documents(q, k, v, ctx)
            count = over_documents(one, one, one, ctx)[..., 0] if self.mean else None
        return self._output(o, count, spikes, state, new, ctx)

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token.

        Raises:
            PlanError: not causal.
        """
        if not self.causal:
            raise PlanError(f"{self.path or type(self).__name__} is not causal: it has no step for one token")
        mixed = [x] * len(self.inputs)
        if self.token_shift:
            mixed = plan.shift(x, state["shift"], [getattr(self, f"mix_{name}") for name in self.inputs])
        spikes = []
        for name, own in zip(self.inputs, mixed, strict=True):
            y = plan.child(self.get_submodule(name), own, state[name])
            norm = self.get_submodule(f"{name}_norm")
            if not isinstance(norm, nn.Identity):
                y = plan.norm(norm, y)
            neuron = cast(Neuron, self.get_submodule(f"{name}_neuron"))
            spikes.append(lower_fire(plan, neuron, y, state[f"{name}_neuron"]))
        q, k, v = self._lowered_operands(plan, spikes)
        log_decay = self.log_decay(torch.zeros(()))
        o = plan.register(v.width)
        plan.record(
            "spiking",
            -1 if q is None else q,
            -1 if k is None else k,
            v,
            o,
            self.num_heads,
            self._key_dim(),
            self.head_dim,
            a_field(state["memory"]),
            a_field(state["count"]) if self.mean else -1,
            f=(self.scale,),
            p=(None if log_decay is None else torch.exp(log_decay),),
        )
        return plan.child(self.output, self._lowered_finish(plan, o, spikes, state), state["output"])

    def _lowered_operands(
        self, plan: Builder, spikes: Sequence[Register]
    ) -> tuple[Register | None, Register | None, Register]:
        """Records of :meth:`_operands`; queries and keys that are one everywhere are None."""
        raise PlanError(f"{self.path or type(self).__name__} has no form in a decode plan")

    def _lowered_finish(
        self, plan: Builder, o: Register, spikes: Sequence[Register], state: Fields
    ) -> Register:
        """Records of :meth:`_finish`."""
        return lower_fire(plan, self.attention_neuron, o, state["attention_neuron"])

    def _spikes(
        self, x: Tensor, previous: Tensor, state: State, new: State, ctx: Context
    ) -> tuple[Tensor, ...]:
        """Spikes [.., H, head_dim] of the inputs; their states go to ``new``."""
        spikes = []
        for name in self.inputs:
            mixed = x
            if self.token_shift:
                mixed = lerp(previous, x, cast(Tensor, getattr(self, f"mix_{name}")))
            y, new[name] = self.get_submodule(name)(mixed, state[name], ctx)
            y = self.get_submodule(f"{name}_norm")(y)
            key = f"{name}_neuron"
            y, new[key] = fire(cast(Neuron, self.get_submodule(key)), y, state[key], ctx)
            spikes.append(y.unflatten(-1, (-1, self.head_dim)))
        return tuple(spikes)

    def _output(
        self,
        o: Tensor,
        count: Tensor | None,
        spikes: tuple[Tensor, ...],
        state: State,
        new: State,
        ctx: Context,
    ) -> tuple[Tensor, State]:
        """Mean, scale, neuron, output projection."""
        if count is not None:
            o = o / count.clamp(min=1.0)[..., None]  # 0 where a token is invalid
        if self.scale != 1.0:
            o = self.scale * o
        o, new["attention_neuron"] = self._finish(o, spikes, cast(State, state["attention_neuron"]), ctx)
        y, new["output"] = self.output(o, state["output"], ctx)
        return y, new


def over_documents(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """o_t = q_t * sum of k_j^T v_j over the valid tokens j of t's document; zero where t is invalid.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        ctx: a reset begins a document.

    Returns:
        [B, T, H, V]. Linear in T without resets; quadratic with them, where documents are told apart.
    """
    if ctx.valid is not None:
        hidden = ~ctx.valid[..., None, None]
        q, k, v = (tensor.masked_fill(hidden, 0.0) for tensor in (q, k, v))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # 16 bits would round the sums
        if ctx.reset is None:
            return (q @ (k.mT @ v)).transpose(1, 2)
        document = ctx.reset.cumsum(1)
        together = document[:, None, :, None] == document[:, None, None, :]
        return ((q @ k.mT).masked_fill(~together, 0.0) @ v).transpose(1, 2)


def _exponents(heads: int, like: Tensor | None = None) -> Tensor:
    """N of every head's decay 1 - 2**-n, whole numbers from the fastest to the slowest, [H]."""
    device, dtype = (None, torch.float32) if like is None else (like.device, like.dtype)
    step = (SLOWEST - FASTEST) / max(heads - 1, 1)
    first = FASTEST if heads > 1 else math.ceil((FASTEST + SLOWEST) / 2)
    return torch.round(torch.arange(heads, device=device, dtype=dtype) * step) + first
