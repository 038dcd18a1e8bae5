"""Packed documents in a model with sink tokens: the sequence is run in pieces between resets.

A part that meets a reset starts from its own empty state; with sinks a document starts from the state after
them. So the columns are cut wherever some row is reset, and the rows that are get the model's initial state
from the caller of the parts, who alone knows it.

Under ZeRO stage 3 every pass through a block gathers its weights from all ranks, whose documents begin in
other columns: a rank with fewer pieces makes up for them with passes over two tokens that count for nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from spikelm import state as states
from spikelm.recurrence import Context
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.model import SpikeLM


def in_segments(
    model: SpikeLM, tokens: Tensor, state: State, ctx: Context, initial: State | None = None
) -> tuple[Tensor, State]:
    """``model.features`` for tokens [B, T] with resets, piece by piece.

    Auxiliary losses are means over the tokens of a pass; those of the pieces are weighed by their tokens, so
    that they weigh what they would in one pass. (What is not linear in the tokens, such as the balance of a
    mixture of experts, is measured in every piece by itself.)

    Args:
        model: with sink tokens.
        tokens: int64 [B, T].
        state: state before the first token.
        ctx: with or without a reset mask.
        initial: the model's initial state, if it is known.

    Returns:
        features [B, T, D] and the state after the last token; the head's state is reset with the others only
        where the model has no head neuron with memory, because the head runs later.
    """
    reset, length, split = ctx.reset, tokens.shape[1], _split(model)
    if reset is None and not split:
        return model.features(tokens, state, ctx)
    reset = torch.zeros_like(tokens, dtype=torch.bool) if reset is None else reset
    cuts = sorted({0, *torch.nonzero(reset.any(0)).flatten().tolist(), length})
    if initial is None:
        initial = model.init_state(tokens.shape[0], tokens.device, max_len=model.capacity(state))
    counted = tokens.new_ones(tokens.shape) if ctx.valid is None else ctx.valid
    total = counted.sum().clamp(min=1)
    missing = _most(len(cuts) - 1, tokens.device) - (len(cuts) - 1) if split else 0
    pieces = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        state = _restarted(state, initial, reset[:, start])
        inner = dataclasses.replace(ctx.columns(start, stop), reset=None)
        losses: list[Tensor] = []
        if ctx.losses is not None:
            inner = dataclasses.replace(inner, losses=losses)
        h, state = model.features(tokens[:, start:stop], state, inner)
        pieces.append(h)
        if ctx.losses is not None:
            share = counted[:, start:stop].sum().double() / total
            ctx.losses.extend((loss * share).to(loss.dtype) for loss in losses)
    features = torch.cat(pieces, 1)
    if missing:
        features = features + _made_up(model, tokens, state, initial, missing)
    return features, state


def _restarted(state: State, initial: State, rows: Tensor) -> State:
    """The initial state in ``rows`` (bool [B]); that of the head, which runs later, is left alone."""
    new = states.where(rows, initial, state)
    return {**new, "head": state["head"]} if "head" in state else new


def _split(model: SpikeLM) -> bool:
    """Whether each rank holds a part of the weights (DeepSpeed marks the parameters that it splits)."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return together and any(hasattr(parameter, "ds_status") for parameter in model.parameters())


def _most(pieces: int, device: torch.device) -> int:
    """The largest number of pieces among the ranks."""
    most = torch.tensor(pieces, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _made_up(model: SpikeLM, tokens: Tensor, state: State, initial: State, passes: int) -> Tensor:
    """Zero, after ``passes`` over the first tokens, as many as documents begin more on another rank.

    They are chained like pieces, so that hooks and recomputation in backward see what they see there.
    """
    rows = torch.ones_like(tokens[:, 0], dtype=torch.bool)
    zero = torch.zeros((), device=tokens.device)
    for _ in range(passes):
        state = _restarted(state, initial, rows)
        h, state = model.features(tokens[:, :2], state, Context())  # one token would take the way of a step
        zero = zero + h.masked_fill(rows[:, None, None], 0.0).sum()
    return zero
