"""Gated linear attention in plain torch: matrix products within chunks, a short loop over the chunks.

Within a chunk token i sees token j <= i with weight sum_c q_ic k_jc P_ijc, where P_ij is the product of the
decays exp(g) of the tokens j + 1 to i. P cannot be written as a quotient of products from the start of the
chunk: those underflow, and are zero for a closed gate. So a chunk is built by doubling. Two neighbouring
blocks become one; a query of the right block carries the product of the decays from its block's start to
itself, a key of the left block that of the decays after itself to its block's end, and one matrix product of
the two gives all weights between them. Every factor is a product of numbers between 0 and 1: nothing
overflows, no large numbers cancel, any gate from 0 to -inf is exact, in gradients too. log2(64) such rounds
cost as much as the one product that gates of a single number per head need. A reset is a decay of zero.

Gradients are autograd's. The rounds are computed again in backward, so that what is kept is the inputs, the
weights [B, T, H, 64] and one state per chunk. Equations and masks as in reference.py; the block decomposition
is the one of the paper's section 4.3, taken to its end.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spikelm.kernels.gla import reference

LONGEST_CHUNK = 64


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and state [B, G, K, V]; shapes as in the op, one floating dtype."""
    steps, groups = q.shape[1], k.shape[2]
    if steps <= 1 or not len(q):
        return reference.gla(q, k, v, g, state, scale, reset, valid)
    q, k, v, g = reference.hide_invalid(q, k, v, g, valid)
    decay = None if g is None else torch.exp(g)
    if reset is not None:
        closed = reset[:, :, None, None]
        decay = (~closed).to(k.dtype) if decay is None else decay.masked_fill(closed, 0.0)
        state = torch.where(reset[:, 0, None, None, None], 0.0, state)

    length = min(LONGEST_CHUNK, 1 << (steps - 1).bit_length())
    keys, values = _cut(k, length), _cut(v, length)
    queries = _cut((scale * q).unflatten(2, (groups, -1)), length)  # [B, G, N, L, n, K]
    decays = None if decay is None else _cut(decay, length, filler=1.0)
    weights, since, until = _weights(queries, keys, decays)

    entering = (keys if until is None else keys * until).mT @ values
    passed = None if since is None else since[..., -1, :, None]
    starts, final = _across_chunks(entering, passed, state)
    carried = queries if since is None else queries * since[..., None, :]
    o = weights @ values + carried.flatten(3, 4) @ starts  # rows are (token, query head) pairs
    o = o.unflatten(3, (length, -1)).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2, 3)
    return o[:, :steps], final


def _cut(x: Tensor, length: int, filler: float = 0.0) -> Tensor:
    """[B, T, G, ...] -> [B, G, chunks, length, ...], the last chunk filled up."""
    extra = -x.shape[1] % length
    if extra:
        x = torch.cat([x, x.new_full((x.shape[0], extra, *x.shape[2:]), filler)], 1)
    chunks: Tensor = x.unflatten(1, (-1, length)).movedim(3, 1)
    return chunks.contiguous()


def _weights(q: Tensor, k: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights of the tokens of each chunk for each other.

    Args:
        q: [B, G, N, L, n, K], scaled.
        k: [B, G, N, L, K].
        decay: [B, G or 1, N, L, K or 1], or None.

    Returns:
        weights [B, G, N, L n, L], zero above the diagonal; and for each token the product of the decays from
        the chunk's start to it, and of those after it to the chunk's end, in the shape of ``decay``.
    """
    if decay is not None and decay.shape[-1] == k.shape[-1] > 1:
        if not torch.is_grad_enabled():
            return _double(q, k, decay)
        again = checkpoint(_double, q, k, decay, use_reentrant=False, preserve_rng_state=False)
        return cast("tuple[Tensor, Tensor, Tensor]", again)
    length = k.shape[-2]
    weights = (q.flatten(3, 4) @ k.mT).unflatten(3, (length, -1))
    if decay is None:
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return weights.masked_fill(~causal[:, None], 0.0).flatten(3, 4), None, None
    one = torch.ones_like(decay)
    between, since, until = _double(one[..., None, :], one, decay)
    return (weights * between[..., :, None, :]).flatten(3, 4), since, until


def _double(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, by joining blocks of 1, 2, 4, ... tokens; see :func:`_weights`."""
    since, until = decay[..., None, :], torch.ones_like(decay)[..., None, :]  # [.., blocks, tokens, K]
    weights = (q * k[..., None, :]).sum(-1, keepdim=True)  # [.., blocks, tokens n, tokens]
    while since.shape[-3] > 1:
        size = since.shape[-2]
        right = q.unflatten(3, (-1, 2, size))[:, :, :, :, 1]
        left = k.unflatten(3, (-1, 2, size))[:, :, :, :, 0]
        (since_left, since_right), (until_left, until_right) = _pairs(since), _pairs(until)
        across = (right * since_right[..., None, :]).flatten(4, 5) @ (left * until_left).mT
        upper, lower = _pairs(weights)
        weights = torch.cat(
            [torch.cat([upper, torch.zeros_like(upper)], -1), torch.cat([across, lower], -1)], -2
        )
        until = torch.cat([until_left * since_right[..., -1:, :], until_right], -2)
        since = torch.cat([since_left, since_right * since_left[..., -1:, :]], -2)
    return weights.squeeze(3), since.squeeze(3), until.squeeze(3)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right ones of neighbouring blocks, x [B, G, N, blocks, ...]."""
    left, right = x.unflatten(3, (-1, 2)).unbind(4)
    return left, right


def _across_chunks(entering: Tensor, passed: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk, [B, G, N, K, V], and after the last one.

    Args:
        entering: what the tokens of each chunk leave in an empty state, [B, G, N, K, V].
        passed: share of a state that outlasts each chunk, [B, G or 1, N, K or 1, 1]; None for all of it.
        state: before the first chunk, [B, G, K, V].
    """
    starts = []
    shares = [None] * entering.shape[2] if passed is None else passed.unbind(2)
    # unbind, not indexing: the gradient of an index is a tensor of zeros as large as the whole
    for new, share in zip(entering.unbind(2), shares, strict=True):
        starts.append(state)
        state = state + new if share is None else torch.addcmul(new, share, state)
    return torch.stack(starts, 2), state
