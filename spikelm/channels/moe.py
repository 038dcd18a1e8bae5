"""``moe``: a mixture of SwiGLU experts, k of which compute a token (dropless), beside shared ones.

s = softmax or sigmoid of W_r x; the k experts with the largest s + b are chosen;
y = sum_i shared_i(x) + scale * sum_{chosen i} w_i expert_i(x), w = s of the chosen, divided by their sum
where ``normalise_weights`` says so. The bias b is zero unless ``loss_free_bias`` is set (arXiv 2408.15664):
it steers the choice, never the weights, and after every training step moves by the rate towards experts that
got less than their share, b_i += rate * sign(mean load - load_i). Sources of the rest: see ``routing.py``.

Every token is computed by all of its k experts: there is no capacity, so a token's result does not depend on
the others. Tokens that are not valid go nowhere and are in no loss and no load. The balance and z losses are
means over the valid tokens of one call (one micro-batch of one rank); the trainer weighs them by counted
tokens, like the loss itself.

State: {"router": ..., "shared": {"0": ..., ...}}, their input neurons' states. Experts have none: a token
visits only some of them, so nothing in them may remember the token before.

Deviations: none from the formulas; of equal scores the first expert wins.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from spikelm.build import Build
from spikelm.channels.experts import Experts
from spikelm.channels.routing import ROUTERS, Routing, balance_loss, route, z_loss
from spikelm.channels.swiglu import hidden_width
from spikelm.errors import ConfigError, nearest
from spikelm.kernels.plan.builder import fields
from spikelm.recurrence import Context, Part, memory_dtype
from spikelm.registry import channels
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register


@channels.register("moe")
class MoE(Part):
    """Mixture of experts.

    Args:
        build: place in the model.
        experts: E, experts among which a token's are chosen.
        top_k: k, experts that compute a token.
        shared: experts that compute every token.
        hidden: width of an expert's hidden layer; None: that of ``swiglu`` by default.
        shared_hidden: width of a shared expert's hidden layer; None: ``hidden``.
        router: ``softmax`` or ``sigmoid``.
        normalise_weights: whether the weights of a token's experts are divided by their sum.
        scale: factor of the routed experts' sum.
        balance_loss: weight of the Switch Transformer's balance loss.
        loss_free_bias: step by which the bias of an expert moves after every training step; 0 keeps a bias
            that does not move, None has no bias.
        z_loss: weight of the squared logarithm of the router's denominator.

    Attributes:
        expert_bias: float32 [E], a buffer that checkpoints hold; None without ``loss_free_bias``.

    Raises:
        ConfigError: a number that makes no sense, or an expert's neuron that keeps a state.
    """

    full_precision = ("router.linear.weight", "expert_bias")
    expert_bias: Tensor | None

    def __init__(
        self,
        build: Build,
        *,
        experts: int = 8,
        top_k: int = 2,
        shared: int = 0,
        hidden: int | None = None,
        shared_hidden: int | None = None,
        router: str = "softmax",
        normalise_weights: bool = True,
        scale: float = 1.0,
        balance_loss: float = 0.01,
        loss_free_bias: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        """Weights are set by ``spikelm.initialisation``."""
        super().__init__()
        if router not in ROUTERS:
            raise ConfigError(nearest("router of channel moe", router, ROUTERS))
        if experts < 1:
            raise ConfigError(f"channel moe: experts is {experts}; expected at least 1")
        if not 1 <= top_k <= experts:
            raise ConfigError(
                f"channel moe: top_k is {top_k}; expected 1 to {experts}, the number of experts"
            )
        given = {"shared": shared, "balance_loss": balance_loss, "z_loss": z_loss}
        for name, value in {**given, "loss_free_bias": loss_free_bias or 0.0}.items():
            if value < 0:
                raise ConfigError(f"channel moe: {name} is {value}; expected zero or more")
        width = hidden_width("channel moe", build.hidden_size, hidden, 8 / 3, 64)
        if shared_hidden is not None and shared_hidden < 1:
            raise ConfigError(
                f"channel moe: shared_hidden is {shared_hidden}; expected a positive number, or null"
            )
        shared_width = width if shared_hidden is None else shared_hidden
        self.hidden_size, self.top_k = build.hidden_size, top_k
        self.kind, self.normalise, self.scale = router, normalise_weights, float(scale)
        self.balance_loss, self.z_loss = float(balance_loss), float(z_loss)
        self.loss_free_bias = loss_free_bias
        self.router = build.projection("router", build.hidden_size, experts)
        self.experts = Experts(
            build.child("channel", f"experts.{index}", {"name": "swiglu", "hidden": width})
            for index in range(experts)
        )
        self.experts.check()
        self.shared = nn.ModuleList(
            build.child("channel", f"shared.{index}", {"name": "swiglu", "hidden": shared_width})
            for index in range(shared)
        )
        self.register_buffer("expert_bias", None if loss_free_bias is None else torch.zeros(experts))

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """States of the router's and the shared experts' input neurons."""
        return {
            "router": self.router.init_state(batch, device, dtype, max_len),
            "shared": {
                str(index): cast(Part, part).init_state(batch, device, dtype, max_len)
                for index, part in enumerate(self.shared)
            },
        }

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, as the equation above says it."""
        return self._mix(x, state, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: the valid ones are sorted by expert, so that each expert is called once."""
        return self._mix(x, state, ctx)

    def _mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        new: State = {}
        logits, new["router"] = self._logits(x, cast(State, state["router"]), ctx)
        tokens, logits = x.flatten(0, -2), logits.flatten(0, -2)
        if x.dim() == 3:
            tokens = tokens[:, None]
        rows: Tensor | None = None
        if ctx.valid is not None:
            rows = ctx.valid.reshape(-1).nonzero()[:, 0]
            tokens, logits = tokens[rows], logits[rows]
        routing = route(
            logits,
            self.expert_bias,
            router=self.kind,
            top_k=self.top_k,
            normalise=self.normalise,
            scale=self.scale,
        )
        if x.dim() == 3 and not ctx.sinks:
            self._account(routing, logits, ctx)
        found = self.experts(tokens, routing, _per_token(x, rows, ctx))
        if rows is not None:
            whole = found.new_zeros(x[..., 0].numel(), self.hidden_size)
            found = whole.index_copy(0, rows, found)
        y = found.view(x.shape)
        shared: State = {}
        for index, part in enumerate(self.shared):
            own = cast(State, cast(State, state["shared"])[str(index)])
            more, shared[str(index)] = part(x, own, ctx)
            y = y + more
        new["shared"] = shared
        return y, new

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token: the router, the experts that a row chose, the shared ones."""
        logits = plan.child(self.router, x, state["router"])
        chosen, weights = plan.register(self.top_k), plan.register(self.top_k)
        found = plan.register(self.top_k * self.hidden_size)
        plan.record(
            "route",
            logits,
            chosen,
            weights,
            plan.register(len(self.experts)),
            len(self.experts),
            self.top_k,
            f=(self.scale,),
            p=(self.expert_bias,),
            flags=(self.kind == "softmax") | (self.normalise << 1),
        )
        for index, expert in enumerate(self.experts):
            with plan.chosen(chosen, self.top_k, index, x, found) as own:
                own.output = plan.child(expert, x, _no_fields(cast(Part, expert).init_state(1)))
        y = plan.register(x.width)
        plan.record("combine", found, weights, y, x.width, self.top_k)
        for index, part in enumerate(self.shared):
            y = plan.add(y, plan.child(part, x, fields(state["shared"])[str(index)]))
        return y

    def _logits(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """The router's logits in its own precision, whatever the rest of the model computes in."""
        with torch.autocast(x.device.type, enabled=False):
            logits, new = self.router(x.to(memory_dtype(x)), state, ctx)
        return logits, new

    def _account(self, routing: Routing, logits: Tensor, ctx: Context) -> None:
        """Append the auxiliary losses, and count where the tokens went."""
        if ctx.losses is not None:
            if self.balance_loss:
                ctx.losses.append(self.balance_loss * balance_loss(routing))
            if self.z_loss:
                ctx.losses.append(self.z_loss * z_loss(logits))
        if ctx.loads is not None:
            before = ctx.loads.get(self.path)
            ctx.loads[self.path] = routing.load if before is None else before + routing.load

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the bias after a training step; nothing happens without ``loss_free_bias``.

        Args:
            load: int64 [E], the tokens of the whole step that went to each expert.
        """
        if self.expert_bias is None or not self.loss_free_bias:
            return
        load = load.to(self.expert_bias.device, torch.float64)
        self.expert_bias += (self.loss_free_bias * (load.mean() - load).sign()).to(self.expert_bias.dtype)


def _per_token(x: Tensor, rows: Tensor | None, ctx: Context) -> Context:
    """The context in which each token of x is a sequence of its own.

    Args:
        x: [B, T, D], or [B, D], where each row is one already.
        rows: which of the B * T tokens are left, or None for all.
        ctx: that of x.
    """
    random = ctx.random
    if random is not None:
        stream, position = random.stream.to(random.position.device), random.position
        if x.dim() == 3:
            stream, position = stream.repeat_interleave(x.shape[1]), position.reshape(-1, 1)
        if rows is not None:
            stream, position = stream[rows], position[rows]
        random = replace(random, stream=stream, position=position)
    return replace(ctx, reset=None, valid=None, random=random)


def _no_fields(state: State) -> Fields:
    """The state of a part without memory, as a plan sees it."""
    return {name: _no_fields(value) for name, value in state.items() if isinstance(value, dict)}
