"""The one training loss: next-token cross-entropy, optional L2Wrap, auxiliary losses of the neurons.

The head is applied to chunks of tokens when the vocabulary is large, each chunk recomputed in backward, so
that no more than ``CHUNK_ELEMENTS`` logits are computed at a time, forward or backward. The head's own state
(a spiking head has membranes) is carried from chunk to chunk, so a chunked pass is the whole pass.

L2Wrap (RWKV-4, used by SpikeGPT) adds nothing to the value of the loss; it adds to the gradient of each
token's largest logit ``l2wrap / count * logit``, which keeps the logits near zero.

Deviations: the published L2Wrap divides by B*T and also acts on ignored tokens; here it acts on counted
tokens only and divides by their number. Without ignored tokens the two are the same, and only this form makes
accumulated micro-batches equal to the large batch. An auxiliary loss raised inside a chunked head is averaged
over the chunks (weighted by length); it equals the whole pass when the loss is linear in the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spikelm.errors import ShapeError
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.state import State

LARGE_VOCABULARY = 8192
CHUNK_ELEMENTS = 1 << 24  # 64 MiB in fp32; softmax and gradient keep a few such copies
IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What one pass over a batch gives.

    Attributes:
        loss: scalar to differentiate: mean nats per counted token plus the auxiliary losses.
        nats: scalar, detached: cross-entropy summed over the counted tokens.
        count: int64 scalar: targets that are not ignored.
        aux: scalar, detached: the auxiliary losses contained in ``loss``.
        state: the model's state after the last token.
    """

    loss: Tensor
    nats: Tensor
    count: Tensor
    aux: Tensor
    state: State


class _L2Wrap(torch.autograd.Function):
    """Identity on a summed loss; the gradient also pulls each counted token's largest logit to zero."""

    @staticmethod
    def forward(ctx: Any, nats: Tensor, logits: Tensor, counted: Tensor, factor: float) -> Tensor:
        """``nats`` scalar, ``logits`` [N, V], ``counted`` [N] bool."""
        largest, where = logits.max(dim=-1, keepdim=True)
        ctx.save_for_backward(largest * counted.unsqueeze(-1) * factor, where)
        ctx.shape = logits.shape
        return nats.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Pass the gradient on, and add the pull scaled by the same factor as the loss."""
        (grad,) = grads
        pull, where = ctx.saved_tensors
        return grad, pull.new_zeros(ctx.shape).scatter_(-1, where, pull * grad), None, None


def token_nats(
    logits: Tensor, targets: Tensor, *, l2wrap: float = 0.0, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross-entropy summed over the counted tokens, scalar, in fp32 (fp64 for fp64 logits).

    Args:
        logits: [..., V].
        targets: [...] int64; ``ignore_index`` marks tokens that do not count.
        l2wrap: factor of the extra gradient (1e-4 as published; 0 for none).
        ignore_index: the target that is not counted.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    labels = targets.reshape(-1)
    nats = F.cross_entropy(flat, labels, ignore_index=ignore_index, reduction="sum")
    if l2wrap > 0.0:
        wrapped: Tensor = _L2Wrap.apply(nats, flat, labels != ignore_index, l2wrap)  # type: ignore[no-untyped-call]
        return wrapped
    return nats


def next_token_loss(
    model: SpikeLM,
    tokens_in: Tensor,
    targets: Tensor,
    state: State | None = None,
    ctx: Context | None = None,
    l2wrap: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """Loss of ``model`` on one batch.

    Args:
        model: the core model.
        tokens_in: [B, T] int64.
        targets: [B, T] int64, the token that follows each input, or ``ignore_index``.
        state: incoming state, None for the initial one.
        ctx: context of the pass; auxiliary losses are collected and added when ``ctx.losses`` is a list.
        l2wrap: factor of the L2Wrap gradient, 1e-4 as published.
        ignore_index: the target that is not counted.
        chunk_tokens: tokens of one row per head chunk; None chooses by the vocabulary, 0 never chunks.

    Returns:
        a :class:`LossOutput`; with no counted target at all the loss is zero and not NaN.

    Raises:
        ShapeError: the shapes of inputs and targets differ.
    """
    if tokens_in.shape != targets.shape or tokens_in.dim() != 2:
        raise ShapeError(
            f"next_token_loss got inputs of shape {tuple(tokens_in.shape)} and targets of shape "
            f"{tuple(targets.shape)}; both must be [batch, tokens]"
        )
    ctx = Context() if ctx is None else ctx
    batch, length = tokens_in.shape
    aux: list[Tensor] = []
    inner = dataclasses.replace(ctx, losses=None if ctx.losses is None else aux)
    hidden, state = model.hidden(tokens_in, state, inner)

    width = _chunk_length(batch, length, model.config.vocab_size) if chunk_tokens is None else chunk_tokens
    if width <= 0 or width >= length:
        logits, state = model.head_logits(hidden, state, inner)
        nats = token_nats(logits, targets, l2wrap=l2wrap, ignore_index=ignore_index)
    else:
        nats = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        for start in range(0, length, width):
            stop = min(start + width, length)
            run = _chunk(model, targets[:, start:stop], _slice(inner, start, stop), l2wrap, ignore_index)
            if torch.is_grad_enabled():
                part, extra, state = checkpoint(run, hidden[:, start:stop], state, use_reentrant=False)
            else:
                part, extra, state = run(hidden[:, start:stop], state)
            nats = nats + part
            aux.extend(loss * ((stop - start) / length) for loss in extra)

    count = (targets != ignore_index).sum()
    loss = nats / count.clamp(min=1)
    total = torch.stack([extra.to(loss.dtype) for extra in aux]).sum() if aux else loss.new_zeros(())
    if ctx.losses is not None:
        ctx.losses.extend(aux)
    return LossOutput(loss=loss + total, nats=nats.detach(), count=count, aux=total.detach(), state=state)


def _chunk_length(batch: int, length: int, vocabulary: int) -> int:
    """Tokens of one row per chunk: everything for small vocabularies, else what CHUNK_ELEMENTS allows."""
    if vocabulary <= LARGE_VOCABULARY:
        return length
    return max(1, CHUNK_ELEMENTS // (vocabulary * batch))


def _slice(ctx: Context, start: int, stop: int) -> Context:
    """The context of tokens ``start`` to ``stop``."""
    return dataclasses.replace(
        ctx,
        reset=None if ctx.reset is None else ctx.reset[:, start:stop],
        valid=None if ctx.valid is None else ctx.valid[:, start:stop],
        random=None
        if ctx.random is None
        else dataclasses.replace(ctx.random, position=ctx.random.position[:, start:stop]),
    )


def _chunk(
    model: SpikeLM, targets: Tensor, ctx: Context, l2wrap: float, ignore_index: int
) -> Callable[[Tensor, State], tuple[Tensor, list[Tensor], State]]:
    """Head and loss of one chunk as a function that may be run again in backward.

    The meter sees the first run only, and auxiliary losses are returned instead of appended: a recomputation
    must leave no trace outside itself.
    """
    seen: list[bool] = []

    def run(hidden: Tensor, state: State) -> tuple[Tensor, list[Tensor], State]:
        extra: list[Tensor] = []
        once = dataclasses.replace(
            ctx, losses=None if ctx.losses is None else extra, meter=None if seen else ctx.meter
        )
        seen.append(True)
        logits, after = model.head_logits(hidden, state, once)
        return token_nats(logits, targets, l2wrap=l2wrap, ignore_index=ignore_index), extra, after

    return run
