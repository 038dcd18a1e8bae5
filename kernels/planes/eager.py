"""Bit planes of counts in plain torch, all channels at once. Layout as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikelm.kernels.planes.reference import check_range


def expand_planes(counts: Tensor, planes: int) -> Tensor:
    """uint8 [planes + 1, .., ceil(D / 8)] of counts int8 [.., D]."""
    # |-128| does not fit int8, but its bits are those of 128 as unsigned bytes.
    magnitude = counts.abs().view(torch.uint8)
    check_range(magnitude, planes)
    bits = torch.stack([(counts < 0).to(torch.uint8), *((magnitude >> b) & 1 for b in range(planes))])
    octets: Tensor = pad(bits, (0, -counts.shape[-1] % 8)).unflatten(-1, (-1, 8))
    placed: Tensor = octets << _places(counts.device)
    return placed.sum(-1, dtype=torch.uint8)


def collapse_planes(packed: Tensor, width: int) -> Tensor:
    """Counts int8 [.., width] of uint8 [planes + 1, .., ceil(width / 8)]."""
    bits = ((packed[..., None] >> _places(packed.device)) & 1).flatten(-2)[..., :width]
    weights = torch.arange(packed.shape[0] - 1, dtype=torch.uint8, device=packed.device)
    weights = weights.view(-1, *[1] * (packed.dim() - 1))
    magnitude = (bits[1:] << weights).sum(0, dtype=torch.uint8).view(torch.int8)
    return torch.where(bits[0] == 1, -magnitude, magnitude)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
