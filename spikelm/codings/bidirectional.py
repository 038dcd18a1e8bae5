"""``bidirectional``: the bits of |n| times the sign of n; ceil(log2(limit + 1)) planes of weight 2^t."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spikelm.codings.base import Coding
from spikelm.codings.bitwise import bit
from spikelm.registry import codings


@codings.register("bidirectional")
class Bidirectional(Coding):
    """Signed binary digits of the magnitude."""

    name: ClassVar[str] = "bidirectional"
    alphabet: ClassVar[tuple[int, ...]] = (-1, 0, 1)
    signed: ClassVar[bool] = True

    def steps(self, limit: int) -> int:
        """ceil(log2(limit + 1))."""
        return limit.bit_length()

    def weight(self, step: int, limit: int) -> int:
        """2^t."""
        return 1 << step

    def plane(self, counts: Tensor, step: int, limit: int) -> Tensor:
        """sign(n) times bit t of |n|."""
        digits = bit(counts.to(torch.int64).abs(), step)
        return (digits * counts.sign()).to(counts.dtype)
