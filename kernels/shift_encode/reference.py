"""Norm, token shift and encode as a loop over tokens: the specification.

Per token t, with z the normalised features and p the previous token::

    z = norm(x_t);  p = 0 where reset_t
    n_m, V_m = encode(p + mix_m (z - p))          for m = 1 .. M
    p = z where valid_t, else p stays and n = 0
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from spikelm.kernels.encode.reference import adaptive_encode_int8
from spikelm.kernels.shift_encode.options import Norm, Options


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
    mixed = []
    for t in range(x.shape[1]):
        if reset is not None:
            last = torch.where(reset[:, t, None], 0.0, last)
        mixed.append(torch.lerp(last, features[:, t], mixes[:, None]))
        last = features[:, t] if valid is None else torch.where(valid[:, t, None], features[:, t], last)
    whole = torch.stack(mixed, 2) if mixed else x.new_zeros(mixes.shape[0], *x.shape)
    counts, thresholds, statistics = encode_all(whole, options, valid)
    return counts, thresholds, last.clone(), statistics


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """norm(x) over the last dimension."""
    if norm.kind == "layernorm":
        return layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def encode_all(mixed: Tensor, options: Options, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, thresholds and statistics of every projection's input [M, B, T, D]."""
    if valid is not None:
        # What stands at an invalid token (it may be NaN) stays out of every value.
        mixed = torch.where(valid[..., None], mixed, 0.0)
    results = [
        adaptive_encode_int8(own, k, dead_zone, cap)
        for own, k, dead_zone, cap in zip(mixed, options.k, options.dead_zone, options.cap, strict=True)
    ]
    if not results:
        shape = mixed.shape[:-1]
        empty = mixed.new_zeros
        return empty(mixed.shape, dtype=torch.int8), empty(*shape, 1), empty(*shape, 4, dtype=torch.int64)
    counts, thresholds, statistics = (torch.stack(parts) for parts in zip(*results, strict=True))
    if valid is not None:
        statistics = statistics * valid[..., None]
    return counts, thresholds, statistics
