"""The gated delta rule in plain torch: matrix products within chunks, a loop over the chunks.

A token writes k_i^T u_i into the state, with the row u_i = beta_i (v_i - exp(g_i) k_i S_{i-1}). In a chunk
that starts from the state S, with D_ij = g_{j+1} + .. + g_i (and D_i from the start of the chunk)::

    u_i = beta_i (v_i - exp(D_i) k_i S - sum_{j<i} exp(D_ij) (k_i k_j^T) u_j)

is a unit lower triangular system (the UT transform of https://arxiv.org/abs/2406.06484, with the decays of
https://arxiv.org/abs/2412.06464). It is solved for the part X that does not know S and for the factor W of S,
all chunks at once; a loop over the chunks carries S; the outputs of all chunks follow::

    U  = X - W S
    S' = exp(D_L) S + sum_j exp(D_Lj) k_j^T u_j
    o_i = scale (exp(D_i) q_i S + sum_{j<=i} exp(D_ij) (q_i k_j^T) u_j)

Every D_ij is summed over its own tokens: a difference of two running sums would lose the small decays that
stand beside large ones, and would be NaN where g = -inf. Decays are only ever exponentials of non-positive
numbers, so nothing overflows; a reset is g = -inf. Equations and masks as in reference.py; gradients are
autograd's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikelm.kernels.gated_delta import reference

LONGEST_CHUNK = 64


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, G, n, V] and state [B, G, K, V] of q [B, T, G, n, K]; one floating dtype."""
    steps, group = q.shape[1], q.shape[3]
    if steps <= 1:
        return reference.gated_delta(q, k, v, g, beta, state, scale, reset, valid)
    if valid is not None:
        # What stands at an invalid token (it may be NaN) stays out of every value and gradient; a token with
        # g = beta = 0 leaves the state as it is.
        q = torch.where(valid[..., None, None, None], q, 0.0)
        k, v = (torch.where(valid[..., None, None], x, 0.0) for x in (k, v))
        g, beta = (torch.where(valid[..., None], x, 0.0) for x in (g, beta))
    if reset is not None:
        g = torch.where(reset[..., None], -torch.inf, g)

    chunks = -(-steps // LONGEST_CHUNK)
    length = -(-steps // chunks)
    k, v, g, beta = (_cut(x, chunks, length) for x in (k, v, g[..., None], beta[..., None]))
    # The query heads of a group become further rows: they share keys, values and state without repeats.
    q = (
        _cut(scale * q.flatten(3), chunks, length)
        .unflatten(-1, (group, -1))
        .transpose(-2, -3)
        .flatten(-3, -2)
    )

    kept, since, until, whole = _decays(g.squeeze(-1))
    known = beta * kept * (k @ k.mT)
    # Below the diagonal of `known` stands the system; the solver reads nothing else.
    solved = torch.linalg.solve_triangular(
        known, torch.cat([beta * v, beta * since * k], -1), upper=False, unitriangular=True
    )
    fresh, erase = solved.split([v.shape[-1], k.shape[-1]], -1)
    starts, state = _across_chunks(fresh, erase, until * k, whole, state)

    written = fresh - erase @ starts
    seen = (q @ k.mT).unflatten(-2, (group, length)) * kept[..., None, :, :]
    past = (q @ starts).unflatten(-2, (group, length)) * since[..., None, :, :]
    o = past + (seen.flatten(-3, -2) @ written).unflatten(-2, (group, length))
    # [B, G, N, n, L, V] -> [B, T, G, n, V]
    o = o.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, :steps]
    if valid is not None:
        o = torch.where(valid[..., None, None, None], o, 0.0)
    return o, state


def _cut(x: Tensor, chunks: int, length: int) -> Tensor:
    """[B, T, G, F] -> [B, G, chunks, length, F], the last chunk filled up with zeros."""
    extra = chunks * length - x.shape[1]
    if extra:
        x = pad(x, (0, 0, 0, 0, 0, extra))
    whole: Tensor = x.unflatten(1, (chunks, length)).permute(0, 3, 1, 2, 4).contiguous()
    return whole


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of decays within chunks, of log decays g [B, G, N, L].

    Returns:
        exp(D_ij) [B, G, N, L, L] from after token j to token i, 0 above the diagonal; from the start of the
        chunk to each token [B, G, N, L, 1]; from each token to the end [B, G, N, L, 1]; over the whole chunk
        [B, G, N, 1, 1].
    """
    length = g.shape[-1]
    below = torch.ones(length, length, dtype=torch.bool, device=g.device).tril(-1)
    between = torch.where(below, g[..., None], 0.0).cumsum(-2)
    kept = torch.exp(torch.where(below.T, -torch.inf, between))
    since = torch.exp(g.cumsum(-1))[..., None]
    return kept, since, kept[..., -1, :, None], since[..., -1:, :]


def _across_chunks(
    fresh: Tensor, erase: Tensor, keys: Tensor, whole: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Carries the state over the chunks.

    Args:
        fresh: what the tokens write into an empty state, X [B, G, N, L, V].
        erase: how much less they write per unit of the state at the chunk's start, W [B, G, N, L, K].
        keys: keys decayed to the end of the chunk [B, G, N, L, K].
        whole: decay over each chunk [B, G, N, 1, 1].
        state: the incoming state [B, G, K, V].

    Returns:
        States at the start of each chunk [B, G, N, K, V] and the final one [B, G, K, V].
    """
    starts = []
    # unbind, not indexing: the gradient of an index is a tensor of zeros as large as the whole
    for x, w, k, decay in zip(*(part.unbind(2) for part in (fresh, erase, keys, whole)), strict=True):
        starts.append(state)
        state = decay * state + k.mT @ (x - w @ state)
    return torch.stack(starts, 2), state
