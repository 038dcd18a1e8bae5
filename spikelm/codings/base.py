"""What every spike coding shares: its interface, the checks of counts, and making one by name.

A neuron sends an integer count n (SpikingBrain, arXiv 2509.05276, section 3.3). A coding writes it as events
of a small alphabet over S micro-steps, n = sum_t w_t e_t exactly, so that a projection may take one product
for each micro-step and add them up: W n = sum_t w_t (W e_t).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from spikelm.errors import CodingError
from spikelm.registry import codings

LARGEST_LIMIT = 2**15
"""Largest |count| that can be sent: more than that is a fault of the neuron."""


class Coding(ABC):
    """Events over micro-steps for integer counts |n| <= limit.

    A new coding implements :meth:`steps`, :meth:`weight` and :meth:`plane`, and registers itself in
    ``spikelm.registry.codings`` (other packages: the entry point group ``spikelm.codings``).
    """

    name: ClassVar[str]
    """The registered name."""
    alphabet: ClassVar[tuple[int, ...]]
    """Values an event may have."""
    signed: ClassVar[bool]
    """Whether negative counts have a code."""

    @abstractmethod
    def steps(self, limit: int) -> int:
        """Micro-steps S that counts with |n| <= limit need."""

    @abstractmethod
    def weight(self, step: int, limit: int) -> int:
        """What an event at micro-step ``step`` (0 to S - 1) counts for."""

    @abstractmethod
    def plane(self, counts: Tensor, step: int, limit: int) -> Tensor:
        """Events of one micro-step, in the shape and dtype of ``counts``, which were checked."""

    def planes(self, counts: Tensor, limit: int) -> Iterator[tuple[Tensor, int]]:
        """Micro-step after micro-step: (events [.., D], weight), in the memory of one plane.

        Raises:
            CodingError: see :meth:`expand`; raised at the first one.
        """
        self.check(counts, limit)
        for step in range(self.steps(limit)):
            yield self.plane(counts, step, limit), self.weight(step, limit)

    def expand(self, counts: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """All micro-steps at once.

        Args:
            counts: [.., D], whole numbers with |n| <= limit, in any integer or floating dtype.
            limit: largest |count| that may come, from 1.

        Returns:
            events [S, .., D] in the dtype of counts, and the weights of the micro-steps, int64 [S].

        Raises:
            CodingError: counts that are not whole, too large, or negative where the coding has no sign.
        """
        self.check(counts, limit)
        events = torch.stack([self.plane(counts, step, limit) for step in range(self.steps(limit))])
        return events, self.weights(limit, counts.device)

    def weights(self, limit: int, device: torch.device | str | None = None) -> Tensor:
        """Weights of the micro-steps, int64 [S]."""
        return torch.tensor([self.weight(step, limit) for step in range(self.steps(limit))], device=device)

    @staticmethod
    def collapse(events: Tensor, weights: Tensor) -> Tensor:
        """Counts sum_t weights_t events_t, [.., D] in the dtype of events [S, .., D].

        Raises:
            CodingError: as many weights as micro-steps were expected.
        """
        if weights.dim() != 1 or events.dim() == 0 or events.shape[0] != weights.shape[0]:
            raise CodingError(
                f"events {list(events.shape)} with weights {list(weights.shape)}; expected [S, .., D] and [S]"
            )
        total = torch.zeros(events.shape[1:], dtype=torch.int64, device=events.device)
        for event, weight in zip(events, weights.tolist(), strict=True):
            total += event.to(torch.int64) * int(weight)
        return total.to(events.dtype)

    def check(self, counts: Tensor, limit: int) -> None:
        """Refuse counts that have no code.

        Raises:
            CodingError: naming a count at fault, and what to choose instead.
        """
        check_limit(limit)
        if counts.dtype in (torch.bool, torch.uint8) or counts.is_complex():
            raise CodingError(f"counts are {counts.dtype}; expected signed integers or floating numbers")
        if counts.numel() == 0:
            return
        if counts.is_floating_point():
            whole = counts == counts.round()
            if not bool(whole.all()):  # NaN is among them: it differs from itself
                raise CodingError(
                    f"a count is {_first(counts, ~whole):g}; expected whole numbers (the input of a coding "
                    "is what an integer neuron such as adaptive sends, before the threshold scales it)"
                )
        low, high = float(counts.amin()), float(counts.amax())
        worst = low if -low > high else high
        if low < 0 and not self.signed:
            raise CodingError(
                f"coding {self.name!r} got the count {low:g}, but its events are {self._letters()} and "
                "it has codes for counts from 0 only; choose ternary, bidirectional or twos_complement"
            )
        if abs(worst) > limit:
            raise CodingError(
                f"coding {self.name!r} got the count {worst:g} with limit {limit}; expected |count| <= "
                "limit: raise the limit, or lower the neuron's cap"
            )

    def _letters(self) -> str:
        return "{" + ", ".join(map(str, self.alphabet)) + "}"


def check_limit(limit: int) -> None:
    """Refuse limits that are no count.

    Raises:
        CodingError: expected a whole number from 1 to 2^15.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= LARGEST_LIMIT:
        raise CodingError(
            f"the limit of a coding is {limit!r}; expected a whole number from 1 to {LARGEST_LIMIT}"
        )


def needed_limit(counts: Tensor) -> int:
    """The smallest limit for ``counts``: the largest magnitude, at least 1."""
    return max(1, int(counts.abs().amax())) if counts.numel() else 1


def build_coding(name: str) -> Coding:
    """The coding registered under a name.

    Raises:
        ConfigError: there is none.
    """
    coding: Coding = codings.get(name)()
    return coding


def _first(values: Tensor, where: Tensor) -> float:
    return float(values[where].flatten()[0])
