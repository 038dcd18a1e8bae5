"""Which k, and which cap, each projection gets: fewest nats for the same number of spikes.

For every projection and every candidate k, the error of its outputs on the calibration rows is

    penalty = 1/2 sum_o F_o mean_r (y_ro - y'_ro)^2      (nats per token; F: diagonal empirical Fisher)
    cost    = D O mean ones(|n|)                         (additions of a product over bit planes)

The k are chosen to minimise the sum of penalties such that the sum of costs is no more than at one k for
all: the Lagrangian penalty + lambda cost is minimised projection by projection, lambda found by bisection.
Then the smallest cap is taken that costs at most 1% more error than 127: fewer bit planes, rarely fewer
spikes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm.codings.statistics import ones
from spikelm.kernels.encode import adaptive_encode
from spikelm.quantisation.calibration import Sample

FACTORS = tuple(2.0 ** (step / 4) for step in range(-6, 7))
"""Candidates of k, as multiples of the k that was asked for."""
CAPS = (7, 15, 31, 63, 127)
"""Candidates of the cap: all bits of 3 to 7 planes."""
CAP_TOLERANCE = 0.01
"""A smaller cap may raise the squared error by this share."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One setting of one projection's neuron, and what it does on the calibration rows.

    Args:
        k: of the adaptive threshold.
        cap: largest |count|.
        dead_zone: of the neuron.
        error: relative error of the outputs, |y - y'| / |y| over all rows and outputs.
        penalty: predicted rise of the loss, nats per token.
        ones: one-bits of |count| per input.
        clipped: share of counts beyond the cap before it cut them.
        beyond: share of counts beyond 127.
    """

    k: float
    cap: int
    dead_zone: float
    error: float
    penalty: float
    ones: float
    clipped: float
    beyond: float

    def neuron(self) -> dict[str, float | int | str]:
        """The neuron's entry in a configuration."""
        spec: dict[str, float | int | str] = {"name": "adaptive", "k": self.k}
        if self.dead_zone:
            spec["dead_zone"] = self.dead_zone
        if self.cap != CAPS[-1]:
            spec["cap"] = self.cap
        return spec


class Trial:
    """The candidates of one projection.

    Args:
        sample: its calibration.
        target: what its weights got in the model as it was trained, float32 [R, D].
        before: its weights [O, D] there.
        after: the weights [O, D] that it will have (dequantised).
    """

    def __init__(self, sample: Sample, target: Tensor, before: Tensor, after: Tensor) -> None:
        self.rows, self.fisher, self.after = sample.rows, sample.fisher, after
        self.outputs = target @ before.t()
        self.size = before.numel()

    @torch.no_grad()
    def choice(self, k: float, cap: int, dead_zone: float) -> Choice:
        """One candidate."""
        free, threshold = adaptive_encode(self.rows, k=k, dead_zone=dead_zone, cap=2**24)
        counts = free.clamp(-cap, cap)
        delta = (counts * threshold) @ self.after.t() - self.outputs
        energy = float(self.outputs.double().square().sum())
        squares = delta.double().square()
        return Choice(
            k=k,
            cap=cap,
            dead_zone=dead_zone,
            error=math.sqrt(float(squares.sum()) / energy) if energy > 0 else 0.0,
            penalty=0.5 * float((squares.mean(0) * self.fisher).sum()),
            ones=float(ones(counts).double().mean()),
            clipped=float((free.abs() > cap).double().mean()),
            beyond=float((free.abs() > CAPS[-1]).double().mean()),
        )

    def candidates(self, k: float, dead_zone: float) -> list[Choice]:
        """Multiples of k."""
        return [self.choice(k * factor, CAPS[-1], dead_zone) for factor in FACTORS]

    def capped(self, choice: Choice) -> Choice:
        """The choice with the smallest cap that costs next to nothing."""
        for cap in CAPS[:-1]:
            smaller = self.choice(choice.k, cap, choice.dead_zone)
            if smaller.error**2 <= (1 + CAP_TOLERANCE) * choice.error**2:
                return smaller
        return choice


def allocate(
    options: Mapping[str, Sequence[Choice]], sizes: Mapping[str, int], budget: float
) -> dict[str, Choice]:
    """The choice of every projection with the smallest sum of penalties within a budget.

    Args:
        options: path -> candidates.
        sizes: path -> weights D O of the projection.
        budget: largest sum of sizes * ones.

    Returns:
        Path -> choice. Where even the cheapest candidates exceed the budget, those.
    """

    def at(price: float) -> dict[str, Choice]:
        return {
            path: min(found, key=lambda c: (c.penalty + price * sizes[path] * c.ones, c.ones))
            for path, found in options.items()
        }

    def cost(chosen: Mapping[str, Choice]) -> float:
        return sum(sizes[path] * choice.ones for path, choice in chosen.items())

    best = at(0.0)
    if cost(best) <= budget:
        return best
    low, high = 0.0, 1e-12
    while cost(at(high)) > budget:
        low, high = high, high * 4
        if high > 1e12:
            return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) > budget else (low, middle)
    return at(high)
