"""The contract of every part: a state, one step that is the specification, a fast path over a sequence."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm import state as states
from spikelm.errors import ConfigError, ShapeError
from spikelm.randomness import CounterRandom
from spikelm.state import State

if TYPE_CHECKING:
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
    """

    reset: Tensor | None = None
    valid: Tensor | None = None
    random: CounterRandom | None = None
    meter: Meter | None = None
    losses: list[Tensor] | None = None
    step: int = 0

    def at(self, t: int) -> Context:
        """The context of the single step at column ``t`` (reset and valid are the scan's business)."""
        random = None if self.random is None else self.random.at(t)
        return dataclasses.replace(self, reset=None, valid=None, random=random)

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
    grows = False

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

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token: x [B, D] -> (y [B, D'], state). Reads like the equation in the paper."""
        raise ConfigError(f"{type(self).__name__} has no step: it is not causal, call it on whole sequences")

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: x [B, T, D] -> (y [B, T, D'], state after the last one)."""
        return scan(self, x, state, ctx)

    def forward(self, x: Tensor, state: State | None = None, ctx: Context = EMPTY) -> tuple[Tensor, State]:
        """``step`` for x [B, D], ``sequence`` for x [B, T, D]; a missing state is the initial one."""
        if state is None:
            state = self.init_state(x.shape[0], x.device, memory_dtype(x))
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
    initial = part.init_state(x.shape[0], x.device, memory_dtype(x)) if ctx.reset is not None else state
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
