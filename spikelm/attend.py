"""Causal softmax attention over a remembered past, in blocks of queries.

The keys stand in a row: those remembered, right-aligned in time, then those of the current call. A query sees
an unbroken run of them that ends with its own key; how far back it begins (the window, the start of the
document) differs from token to token. Pinned keys (sinks) are seen by every query.

Heads are grouped: query head h reads key and value head h // (H / G), which are not repeated in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 256
"""Queries whose scores are held at once: memory is O(BLOCK * (window + BLOCK)) per head, not O(T^2)."""


def attend_one(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """One query per sequence: o = sum_s softmax_s(q k_s / sqrt(d)) v_s over the visible s.

    Args:
        q: [B, H, d].
        keys: [B, S, G, d].
        values: [B, S, G, d].
        visible: bool [B, S], at least one per row.

    Returns:
        [B, H, d].
    """
    grouped = q.unflatten(1, (keys.shape[2], -1))
    score = torch.einsum("bgnd,bsgd->bgns", grouped, keys) * q.shape[-1] ** -0.5
    weight = score.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bgns,bsgd->bgnd", weight, values).flatten(1, 2)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    pinned: tuple[Tensor, Tensor] | None = None,
    reach: int | None = None,
) -> Tensor:
    """T queries per sequence; query t is that of key column S - T + t.

    Args:
        q: [B, T, H, d].
        keys: [B, S, G, d] with S >= T; columns that no query sees must be finite.
        values: [B, S, G, d].
        first: int64 [B, T], the first column that each query sees.
        pinned: keys and values [B, P, G, d] that every query sees.
        reach: columns before its own that a query sees at most, where ``first`` must not be looked at (a
            captured or compiled call); None to look.

    Returns:
        [B, T, H, d].
    """
    T, past = q.shape[1], keys.shape[1] - q.shape[1]
    starts = range(0, T, BLOCK)
    if reach is None:
        earliest, latest = first.amin(0).tolist(), first.amax(0).tolist()
        if past == 0 and max(latest) == 0 and pinned is None:
            return _product(q, keys, values, causal=True)
        alike, lowest = earliest == latest, [min(earliest[start : start + BLOCK]) for start in starts]
    else:
        alike, lowest = False, [max(past + start - reach, 0) for start in starts]
    bounds = [(low, min(past + start + BLOCK, past + T)) for low, start in zip(lowest, starts, strict=True)]
    outputs = []
    for start, query, k, v, (low, high) in zip(
        starts, q.split(BLOCK, 1), _runs(keys, bounds), _runs(values, bounds), bounds, strict=True
    ):
        own = past + torch.arange(start, start + query.shape[1], device=q.device)
        column = torch.arange(low, high, device=q.device)
        begin = (first[:1] if alike else first)[:, start : start + BLOCK]
        seen = (column >= begin[..., None]) & (column <= own[:, None])
        if pinned is not None:
            k, v = torch.cat([pinned[0], k], 1), torch.cat([pinned[1], v], 1)
            seen = torch.cat([seen.new_ones(*seen.shape[:2], pinned[0].shape[1]), seen], 2)
        outputs.append(_product(query, k, v, seen=seen[:, None]))
    return torch.cat(outputs, 1)


def attend_all(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Every query sees every key: q [B, T, H, d], keys and values [B, S, G, d] -> [B, T, H, d]."""
    return _product(q, keys, values)


def _product(
    q: Tensor, keys: Tensor, values: Tensor, *, seen: Tensor | None = None, causal: bool = False
) -> Tensor:
    grouped = q.shape[2] != keys.shape[2]
    y = scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=seen,
        is_causal=causal,
        enable_gqa=grouped,
    )
    return y.transpose(1, 2)


class _Runs(torch.autograd.Function):
    """Overlapping runs of columns, whose gradients are summed in one pass.

    The gradient of a plain slice is as long as what it was cut from: of T / BLOCK slices, O(T^2) in all.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bounds: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Columns low to high of x [B, S, ...] for every pair of bounds."""
        ctx.shape, ctx.bounds = x.shape, bounds  # type: ignore[attr-defined]
        return tuple(x[:, low:high] for low, high in bounds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Every run's gradient added where it came from."""
        total = gradients[0].new_zeros(ctx.shape)
        for (low, high), gradient in zip(ctx.bounds, gradients, strict=True):
            total[:, low:high] += gradient
        return total, None


def _runs(x: Tensor, bounds: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():
        return tuple(x[:, low:high] for low, high in bounds)
    runs: tuple[Tensor, ...] = _Runs.apply(x, bounds)  # type: ignore[no-untyped-call]
    return runs
