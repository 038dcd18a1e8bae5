"""What a plan counts for a meter, of one projection's input or of one neuron elsewhere (steps_meter.h)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

NUMBERS = ("tokens", "nonzero", "at_cap", "clipped")
"""Columns of the whole numbers, in the order of the C enumeration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """Sums over all tokens of all rows, since they were last cleared.

    Attributes:
        path: of the projection or neuron.
        spiking: whether what is seen are spikes.
        in_features: values of a token.
        out_features: rows of the weights; 0 for a neuron outside projections.
        cap: largest possible |count|, or None.
        numbers: int64 [4], see NUMBERS.
        magnitude: float64 [1], sum of |value|.
        fired: bool [in_features], channels that were not zero at least once.
    """

    path: str
    spiking: bool
    in_features: int
    out_features: int
    cap: int | None
    numbers: Tensor = field(init=False)
    magnitude: Tensor = field(init=False)
    fired: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin at zero."""
        object.__setattr__(self, "numbers", torch.zeros(len(NUMBERS), dtype=torch.int64))
        object.__setattr__(self, "magnitude", torch.zeros(1, dtype=torch.float64))
        object.__setattr__(self, "fired", torch.zeros(self.in_features, dtype=torch.bool))

    def clear(self) -> None:
        """Begin at zero again."""
        for values in (self.numbers, self.magnitude, self.fired):
            values.zero_()
