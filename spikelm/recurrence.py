"""The contract of every part: a state, one step that is the specification, a fast path over a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from spikelm import state as states
from spikelm.errors import ConfigError, PlanError, ShapeError
from spikelm.randomness import CounterRandom
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.codings import Coding
    from spikelm.kernels.plan.builder import Builder, Fields, Register
    from spikelm.meter import Meter


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a part needs to know besides its input and its state.

    Args:
        reset: bool [B, T]; where true the incoming state is replaced by ``init_state`` BEFORE token t.
        valid: bool [B, T]; where false the state stays as it is and the output is zero (padding).
        random: counter-based random source, or None where nothing random happens (evaluation).
        meter: counts spikes at every projection, or None.
        losses: auxiliary losses are appended here, or None.
        step: training step, for schedules.
        coding: projections with integer counts run expanded over the micro-steps of this coding; None runs
            them collapsed, all micro-steps in one product.
        loads: path of a mixture of experts -> int64 [experts], tokens routed to each so far; None outside
            training steps.
        sinks: this call is the model's sink prefix, which softmax attention sees without causal mask and
            keeps in sight of all later tokens.
        static: no size may depend on a value and nothing may be read on the host, because the call is being
            captured into a graph; the caller sees to it that growing memory has room.
    """

    reset: Tensor | None = None
    valid: Tensor | None = None
    random: CounterRandom | None = None
    meter: Meter | None = None
    losses: list[Tensor] | None = None
    step: int = 0
    coding: Coding | None = None
    loads: dict[str, Tensor] | None = None
    sinks: bool = False
    static: bool = False

    def at(self, t: int) -> Context:
        """The context of the single step at column ``t`` (reset and valid are the scan's business)."""
        random = None if self.random is None else self.random.at(t)
        return dataclasses.replace(self, reset=None, valid=None, random=random)

    def columns(self, start: int, stop: int) -> Context:
        """The context of the tokens ``start`` to ``stop`` (exclusive) of the same sequences."""

        def cut(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[:, start:stop]

        random = self.random
        if random is not None:
            random = dataclasses.replace(random, position=random.position[:, start:stop])
        return dataclasses.replace(self, reset=cut(self.reset), valid=cut(self.valid), random=random)

    def unmasked(self) -> Context:
        """The same context without reset and valid, for a call on a single step."""
        return dataclasses.replace(self, reset=None, valid=None)


EMPTY = Context()


class Part(nn.Module):
    """A neuron, mixer, channel or projection.

    A new part implements :meth:`init_state` (if it remembers anything) and :meth:`step`; it works from then
    on, because :meth:`sequence` is a scan of ``step`` until a faster one is written. Parts are used by
    calling them, ``y, state = part(x, state, ctx)``: a 2-D input is one step, a 3-D input a sequence. (Both
    ways go through ``__call__``, where ZeRO-3 and other hooks gather the weights.)
    """

    causal = True
    """Whether a token sees only the tokens before it; parts that are not causal have no ``step``."""
    grows = False
    """Whether the state of this part (not of its children) needs room for every token; see ``reserve``."""

    path = ""
    """Dotted name inside the model; set by the model, used by meters, overrides and random sources."""

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """State before the first token: tensors [batch, ...]; empty for parts without memory.

        Args:
            batch: number of sequences.
            device: device of the tensors.
            dtype: dtype of the memory, float32 unless given (float64 for float64 models).
            max_len: positions to allocate, for parts that grow.
        """
        return {}

    def capacity(self, state: State) -> int | None:
        """Tokens for which the growing memory in ``state`` has room; None where nothing grows."""
        found = [child.capacity(own) for child, own in self._remembering(state)]
        sizes = [size for size in found if size is not None]
        return min(sizes) if sizes else None  # min(.., default=None) is no graph for torch.compile

    def reserve(self, state: State, max_len: int) -> State:
        """The same state with room for ``max_len`` tokens where memory grows (never less than before)."""
        new = dict(state)
        for name, child in self.named_children():
            if isinstance(child, Part) and isinstance(new.get(name), dict):
                new[name] = child.reserve(cast(State, new[name]), max_len)
        return new

    def _remembering(self, state: State) -> list[tuple[Part, State]]:
        """Children with their states, which stand under the names of their attributes."""
        return [
            (child, cast(State, state[name]))
            for name, child in self.named_children()
            if isinstance(child, Part) and isinstance(state.get(name), dict)
        ]

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token: x [B, D] -> (y [B, D'], state). Reads like the equation in the paper."""
        raise ConfigError(f"{type(self).__name__} has no step: it is not causal, call it on whole sequences")

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: x [B, T, D] -> (y [B, T, D'], state after the last one)."""
        return scan(self, x, state, ctx)

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """Write ``step`` as records into a decode plan (docs/decoding.md).

        Args:
            plan: the plan under construction.
            x: register of the input, [B, D].
            state: where the tensors of ``init_state`` lie in the pool, under the same names.

        Returns:
            Register of the output.

        Raises:
            PlanError: the part, in this form, has no records.
        """
        name = f"{self.path} ({type(self).__name__})" if self.path else type(self).__name__
        raise PlanError(f"{name} has no lower(), so its model cannot be compiled into a decode plan")

    def forward(self, x: Tensor, state: State | None = None, ctx: Context = EMPTY) -> tuple[Tensor, State]:
        """``step`` for x [B, D], ``sequence`` for x [B, T, D]; a missing state is the initial one."""
        if state is None:
            length = x.shape[1] if x.dim() == 3 else 1
            state = self.init_state(x.shape[0], x.device, memory_dtype(x), length)
        if x.dim() == 2:
            if ctx.reset is not None or ctx.valid is not None:
                raise ShapeError(
                    f"{type(self).__name__} got reset or valid with a single step [B, D]; give it [B, 1, D]"
                )
            return self.step(x, state, ctx)
        if x.dim() != 3:
            raise ShapeError(f"{type(self).__name__} got {tuple(x.shape)}; expected [B, D] or [B, T, D]")
        return self.sequence(x, state, ctx)


def scan(part: Part, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
    """The meaning of ``sequence``: a loop of ``step`` over T with reset and valid.

    Args:
        part: any causal part.
        x: [B, T, D] with T >= 1.
        state: state before the first token.
        ctx: its reset and valid are applied here.
    """
    initial = initial_like(part, x, state) if ctx.reset is not None else state
    outputs = []
    for t in range(x.shape[1]):
        if ctx.reset is not None:
            state = states.where(ctx.reset[:, t], initial, state)
        y, new = part.step(x[:, t], state, ctx.at(t))
        if ctx.valid is not None:
            keep = ctx.valid[:, t]
            new = states.where(keep, new, state)
            y = torch.where(keep[:, None], y, torch.zeros_like(y))
        state = new
        outputs.append(y)
    return torch.stack(outputs, 1), state


def initial_like(part: Part, x: Tensor, state: State) -> State:
    """The part's state before any token, in the shapes of ``state``; x [B, T, D] gives device and dtype."""
    return part.init_state(x.shape[0], x.device, memory_dtype(x), part.capacity(state))


def memory_dtype(x: Tensor) -> torch.dtype:
    """Dtype of recurrent memory for activations ``x``: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def zero_invalid(y: Tensor, ctx: Context) -> Tensor:
    """Activations y [B, T, D] with zeros where ``ctx.valid`` is false."""
    if ctx.valid is None:
        return y
    return torch.where(ctx.valid[..., None], y, y.new_zeros(()))


def token_shift(x: Tensor, last: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """The previous token's features at every position (RWKV's token shift).

    Args:
        x: [B, T, D].
        last: [B, D], the last valid token before x (zeros at the start), in the memory dtype.
        ctx: a reset makes the previous token zero; invalid tokens are passed over.

    Returns:
        previous [B, T, D] in x's dtype, and the new ``last`` [B, D] in the memory dtype.
    """
    T = x.shape[1]
    before = torch.cat([last.to(x.dtype)[:, None], x], 1)
    if ctx.valid is None:
        previous, final = before[:, :-1], x[:, -1]
        if ctx.reset is not None:
            previous = previous.masked_fill(ctx.reset[..., None], 0.0)
        return previous, final.to(memory_dtype(x))
    # Column s of `before` is token s - 1; column 0 is the incoming state.
    column = torch.arange(1, T + 1, device=x.device)
    newest = torch.cummax(torch.where(ctx.valid, column, 0), 1).values
    source = torch.cat([newest.new_zeros(x.shape[0], 1), newest], 1)
    gathered = before.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))
    if ctx.reset is not None:
        # A reset before token t wipes every older token, the incoming state (column 0) included.
        wiped = torch.cummax(torch.where(ctx.reset, column, 0), 1).values
        wiped = torch.cat([wiped, wiped[:, -1:]], 1)
        gathered = gathered.masked_fill((wiped > 0)[..., None] & (source < wiped)[..., None], 0.0)
    return gathered[:, :-1], gathered[:, -1].to(memory_dtype(x))


def positions(last: Tensor, ctx: Context, steps: int) -> tuple[Tensor, Tensor]:
    """Position of every token in its document.

    Args:
        last: int64 [B], valid tokens seen since the last reset.
        ctx: its reset and valid are applied here.
        steps: T.

    Returns:
        int64 [B, T]: valid tokens between the last reset and this token (an invalid token has the position of
        the next valid one), and the new ``last`` [B].
    """
    B, device = last.shape[0], last.device
    valid = torch.ones(B, steps, dtype=torch.bool, device=device) if ctx.valid is None else ctx.valid
    after = last[:, None] + valid.cumsum(1)
    if ctx.reset is not None:
        # What had been counted before the newest reset does not count.
        forgotten = torch.where(ctx.reset, after - valid.long(), 0).cummax(1).values
        after = after - forgotten
    return after - valid.long(), after[:, -1]


def compacted(
    run: Callable[[Tensor, State, Context], tuple[Tensor, State]],
    x: Tensor,
    state: State,
    ctx: Context,
    initial: Callable[[], State],
) -> tuple[Tensor, State]:
    """Call ``run`` with every row's valid tokens at its left end, and put the outputs where they belong.

    For parts that look at the previous valid tokens: ``run`` sees padding only on the right. A reset at an
    invalid token is passed on to the next valid one; where there is none the state after ``run`` is replaced.

    Args:
        run: (x [B, T, D], state, ctx) -> (y [B, T, D'], state), where invalid tokens change no state.
        x: [B, T, D].
        state: state before the first token.
        ctx: with any masks.
        initial: the state before any token.

    Returns:
        y [B, T, D'], zero where invalid, and the state.
    """
    valid = ctx.valid
    if valid is None:
        return run(x, state, ctx)
    T = x.shape[1]
    order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)
    back = torch.argsort(order, dim=1)
    reset, tail = None, None
    if ctx.reset is not None:
        # Resets up to and including each token; a valid token takes those since the valid one before it.
        seen = ctx.reset.long().cumsum(1).gather(1, order)
        before = torch.cat([seen.new_zeros(seen.shape[0], 1), seen[:, :-1]], 1)
        packed = valid.gather(1, order)
        reset = (seen > before) & packed
        last = (seen * packed).amax(1)
        tail = ctx.reset.sum(1) > last
    inner = dataclasses.replace(ctx, reset=reset, valid=valid.gather(1, order))
    if ctx.random is not None:
        random = dataclasses.replace(ctx.random, position=ctx.random.position.gather(1, order))
        inner = dataclasses.replace(inner, random=random)
    y, state = run(x.gather(1, order[..., None].expand(-1, T, x.shape[-1])), state, inner)
    if tail is not None:
        state = states.where(tail, initial(), state)
    y = y.gather(1, back[..., None].expand(-1, T, y.shape[-1]))
    return zero_invalid(y, ctx), state
