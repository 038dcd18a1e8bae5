"""``binary``: a count n >= 0 is n ones, then zeros; S = limit micro-steps of weight 1."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from spikelm.codings.base import Coding
from spikelm.registry import codings


@codings.register("binary")
class Binary(Coding):
    """Rate code over {0, 1}: e_t = [t < n]."""

    name: ClassVar[str] = "binary"
    alphabet: ClassVar[tuple[int, ...]] = (0, 1)
    signed: ClassVar[bool] = False

    def steps(self, limit: int) -> int:
        """As many as the largest count."""
        return limit

    def weight(self, step: int, limit: int) -> int:
        """One."""
        return 1

    def plane(self, counts: Tensor, step: int, limit: int) -> Tensor:
        """[t < n]."""
        return (counts > step).to(counts.dtype)
