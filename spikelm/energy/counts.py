"""Elementary operations, the unit in which every part of a model tells what it does for a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

KINDS = (
    "projection",
    "head",
    "embedding",
    "recurrence",
    "attention",
    "convolution",
    "rotation",
    "shift",
    "gate",
    "activation",
    "norm",
    "neuron",
    "routing",
    "residual",
)
"""What operations are for; the rows of the ledger."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of one token, as a mean over the tokens that were measured.

    The first term of a sum is a multiply-accumulate too. Constants (the exponential of a decay, a gain) are
    computed before the first token and do not count; a change of sign, a magnitude and a choice between two
    numbers are free.

    Attributes:
        dense_macs: multiply-accumulates if no operand is looked at.
        effective_macs: those without a zero among their operands, where somebody looks (weights are taken to
            have no zeros).
        macs_without_spikes: the part of ``effective_macs`` whose input is no spike.
        accumulates: additions that stand for the other part: |count| of them for a count.
        multiplications: single ones.
        additions: additions and subtractions.
        comparisons: comparisons, larger or smaller of two.
        roundings: to a whole number.
        divisions: of two variables (by a constant: a multiplication).
        roots: square roots.
        exponentials: exp, log, sine, cosine.
        values: numbers read from and written to what is on the chip, weights and states not among them.
    """

    dense_macs: float = 0.0
    effective_macs: float = 0.0
    macs_without_spikes: float = 0.0
    accumulates: float = 0.0
    multiplications: float = 0.0
    additions: float = 0.0
    comparisons: float = 0.0
    roundings: float = 0.0
    divisions: float = 0.0
    roots: float = 0.0
    exponentials: float = 0.0
    values: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        """Both."""
        return Operations(**{name: getattr(self, name) + getattr(other, name) for name in NAMES})

    def __mul__(self, factor: float) -> Operations:
        """As often as ``factor`` says."""
        return Operations(**{name: getattr(self, name) * factor for name in NAMES})

    __rmul__ = __mul__

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {name: float(getattr(self, name)) for name in NAMES}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> Self:
        """The inverse of :meth:`to_dict`; further keys are passed over."""
        return cls(**{name: float(values[name]) for name in NAMES})


NAMES = tuple(field.name for field in fields(Operations))
"""Fields of :class:`Operations`."""

Kinds = Mapping[str, Operations]
"""Operations of a part by what they are for (a name of KINDS)."""


def macs(number: float, **others: float) -> Operations:
    """Multiply-accumulates of dense operands, and other operations."""
    return Operations(dense_macs=number, effective_macs=number, macs_without_spikes=number, **others)


def total(operations: Mapping[str, Operations]) -> Operations:
    """The sum of all kinds."""
    return sum(operations.values(), Operations())
