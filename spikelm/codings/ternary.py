"""``ternary``: the sign of a count n is sent |n| times; S = limit micro-steps of weight 1.

On symmetric counts it needs half the micro-steps of ``binary`` on counts that were shifted to be positive.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from spikelm.codings.base import Coding
from spikelm.registry import codings


@codings.register("ternary")
class Ternary(Coding):
    """Rate code over {-1, 0, 1}: e_t = sign(n) [t < |n|]."""

    name: ClassVar[str] = "ternary"
    alphabet: ClassVar[tuple[int, ...]] = (-1, 0, 1)
    signed: ClassVar[bool] = True

    def steps(self, limit: int) -> int:
        """As many as the largest magnitude."""
        return limit

    def weight(self, step: int, limit: int) -> int:
        """One."""
        return 1

    def plane(self, counts: Tensor, step: int, limit: int) -> Tensor:
        """sign(n) [t < |n|]."""
        # Two comparisons: the magnitude of int8's -128 is not an int8.
        return (counts > step).to(counts.dtype) - (counts < -step).to(counts.dtype)
