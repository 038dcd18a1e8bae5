"""From features of every token to features of a text: what a classifier reads."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from spikelm.errors import ConfigError, nearest

Pooling = Literal["mean", "last", "max"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def check_pooling(name: object) -> None:
    """Raise :class:`ConfigError` for a name that is no pooling."""
    if name not in POOLINGS:
        raise ConfigError(nearest("classifier_pooling", str(name), POOLINGS))


def pool(features: Tensor, valid: Tensor | None, how: str, reset: Tensor | None = None) -> Tensor:
    """Features of every row's text; padding takes no part.

    Args:
        features: [B, T, D].
        valid: bool [B, T], true where a token is no padding; None where all are.
        how: ``mean`` over the tokens, ``last`` token, or ``max`` over the tokens per feature.
        reset: bool [B, T], where documents of a packed row start: its last document counts. None for one
            document a row.

    Returns:
        [B, D]; a row without any token gives zeros (``last``: what its last column holds).

    Raises:
        ConfigError: for another name.
    """
    check_pooling(how)
    columns = torch.arange(features.shape[1], device=features.device)
    counted = valid
    if counted is None:
        counted = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if how == "last":
        last = torch.where(counted, columns, -1).amax(1) % features.shape[1]
        return features[torch.arange(features.shape[0], device=features.device), last]
    if reset is not None:
        counted = counted & (columns >= torch.where(reset, columns, 0).amax(1, keepdim=True))
    mask = counted[..., None]
    if how == "mean":
        total = torch.where(mask, features, features.new_zeros(())).sum(1)
        return total / mask.sum(1).clamp(min=1)
    highest = torch.where(mask, features, features.new_full((), -torch.inf)).amax(1)
    return torch.where(counted.any(1, keepdim=True), highest, features.new_zeros(()))
