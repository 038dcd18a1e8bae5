"""Norm, token shift and encode in plain torch, all tokens at once. Equations in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.shift_encode.options import Norm, Options
from spikelm.kernels.shift_encode.reference import encode_all, normalised


def shift_encode(
    x: Tensor,
    norm: Norm,
    last: Tensor,
    mixes: Tensor,
    options: Options,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts [M, B, T, D], thresholds [M, B, T, 1], last [B, D], statistics [M, B, T, 4] of x [B, T, D]."""
    features = normalised(x, norm)
    before = _before(torch.cat([last[:, None], features], 1), reset, valid)
    mixed = torch.lerp(before[:, :-1], features, mixes[:, None, None])
    counts, thresholds, statistics = encode_all(mixed, options, valid)
    return counts, thresholds, before[:, -1].clone(), statistics


def _before(tokens: Tensor, reset: Tensor | None, valid: Tensor | None) -> Tensor:
    """The last valid token before each one and before the end [B, T + 1, D].

    Args:
        tokens: [B, T + 1, D], the incoming token and those of the sequence.
        reset: bool [B, T]; wipes every older token.
        valid: bool [B, T].
    """
    batch, steps = tokens.shape[0], tokens.shape[1] - 1
    if steps == 0 or (reset is None and valid is None):
        return tokens
    column = torch.arange(1, steps + 1, device=tokens.device)
    seen = column.expand(batch, -1) if valid is None else torch.where(valid, column, 0).cummax(1).values
    source = torch.cat([seen.new_zeros(batch, 1), seen], 1)
    before = tokens if valid is None else tokens.gather(1, source[..., None].expand_as(tokens))
    if reset is not None:
        wiped = torch.where(reset, column, 0).cummax(1).values
        wiped = torch.cat([wiped, wiped[:, -1:]], 1)
        before = before.masked_fill((source < wiped)[..., None], 0.0)
    return before
