"""Packed documents in a model with sink tokens: the sequence is run in pieces between resets.

A part that meets a reset starts from its own empty state; with sinks a document starts from the state after
them. So the columns are cut wherever some row is reset, and the rows that are get the model's initial state
from the caller of the parts, who alone knows it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikelm import state as states
from spikelm.recurrence import Context
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.model import SpikeLM


def in_segments(model: SpikeLM, tokens: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
    """``model.hidden`` for tokens [B, T] with resets, piece by piece.

    Args:
        model: with sink tokens.
        tokens: int64 [B, T].
        state: state before the first token.
        ctx: with a reset mask.

    Returns:
        features [B, T, D] and the state after the last token; the head's state is reset with the others only
        where the model has no head neuron with memory, because the head runs later.
    """
    reset = ctx.reset
    assert reset is not None  # the caller looked
    initial = model.init_state(tokens.shape[0], tokens.device, max_len=model.capacity(state))
    cuts = sorted({0, *torch.nonzero(reset.any(0)).flatten().tolist(), tokens.shape[1]})
    pieces = []
    whole = _tokens(ctx, tokens)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        rows = reset[:, start]
        head = state.get("head")
        state = states.where(rows, initial, state)
        if head is not None:
            state = {**state, "head": head}
        inner = dataclasses.replace(ctx.columns(start, stop), reset=None)
        if ctx.losses is not None:
            inner = dataclasses.replace(inner, losses=[])
        h, state = model.hidden(tokens[:, start:stop], state, inner)
        pieces.append(h)
        if ctx.losses is not None and inner.losses:
            # Every part's loss is a mean over its tokens: pieces count by theirs, and add up to one mean.
            share = _tokens(inner, h) / whole
            ctx.losses.extend((loss * share).to(loss.dtype) for loss in inner.losses)
    return torch.cat(pieces, 1), state


def _tokens(ctx: Context, like: Tensor) -> Tensor | float:
    """Valid tokens of a context, at least one; ``like`` is [B, T, ...]."""
    if ctx.valid is None:
        return float(like.shape[0] * like.shape[1])
    return ctx.valid.sum().clamp(min=1).double()
