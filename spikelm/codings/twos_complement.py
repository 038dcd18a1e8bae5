"""``twos_complement``: the bits of n in two's complement.

T = ceil(log2(limit + 1)) planes of weight 2^t, and one more, the sign, of weight -2^T.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from spikelm.codings.base import Coding
from spikelm.codings.bitwise import bit
from spikelm.registry import codings


@codings.register("twos_complement")
class TwosComplement(Coding):
    """Binary digits of signed counts: events {0, 1}, and small negative counts fire in almost every plane."""

    name: ClassVar[str] = "twos_complement"
    alphabet: ClassVar[tuple[int, ...]] = (0, 1)
    signed: ClassVar[bool] = True

    def steps(self, limit: int) -> int:
        """ceil(log2(limit + 1)) + 1."""
        return limit.bit_length() + 1

    def weight(self, step: int, limit: int) -> int:
        """2^t, and -2^T for the last plane."""
        top = limit.bit_length()
        return -(1 << top) if step == top else 1 << step

    def plane(self, counts: Tensor, step: int, limit: int) -> Tensor:
        """Bit t of n; the arithmetic shift repeats the sign above the highest bit."""
        return bit(counts, step)
