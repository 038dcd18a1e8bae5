"""``bitwise``: the bits of a count n >= 0, the lowest first; ceil(log2(limit + 1)) planes of weight 2^t."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spikelm.codings.base import Coding
from spikelm.registry import codings


def bit(values: Tensor, step: int) -> Tensor:
    """Bit ``step`` of whole numbers (two's complement for negative ones), in their dtype."""
    return ((values.to(torch.int64) >> step) & 1).to(values.dtype)


@codings.register("bitwise")
class Bitwise(Coding):
    """Binary digits of non-negative counts."""

    name: ClassVar[str] = "bitwise"
    alphabet: ClassVar[tuple[int, ...]] = (0, 1)
    signed: ClassVar[bool] = False

    def steps(self, limit: int) -> int:
        """ceil(log2(limit + 1))."""
        return limit.bit_length()

    def weight(self, step: int, limit: int) -> int:
        """2^t."""
        return 1 << step

    def plane(self, counts: Tensor, step: int, limit: int) -> Tensor:
        """Bit t of n."""
        return bit(counts, step)
