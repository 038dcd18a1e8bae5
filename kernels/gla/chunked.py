"""Gated linear attention in plain torch: matrix products within chunks, a short loop over the chunks.

The chunks are of 64 tokens. Within a chunk the weights of the tokens for each other are formed first (see
doubling.py, exact for any gate from 0 to -inf), then the outputs; what a chunk leaves behind is added to a
state that decays from chunk to chunk. A reset is a decay of zero. Gates of a single number per head factor
out of the products. Training keeps the inputs, the weights [B, T, H, 64] and one state per chunk. Equations
and masks as in reference.py; the decomposition is the one of the paper's section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.gla import reference
from spikelm.kernels.gla.doubling import doubled

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
        weights, since, until = doubled(q, k, decay)
        return weights.flatten(3, 4), since, until
    length = k.shape[-2]
    weights = (q.flatten(3, 4) @ k.mT).unflatten(3, (length, -1))
    if decay is None:
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return weights.masked_fill(~causal[:, None], 0.0).flatten(3, 4), None, None
    one = torch.ones_like(decay)
    between, since, until = doubled(one[..., None, :], one, decay)
    return (weights * between).flatten(3, 4), since, until


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
