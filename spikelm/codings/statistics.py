"""Spike statistics of counts under every coding, from one histogram.

What a coding sends depends on the count alone, so the histogram of counts (255 bins as a rule) gives every
figure exactly, for any window of micro-steps, without keeping the counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spikelm.codings.base import LARGEST_LIMIT, Coding, build_coding
from spikelm.errors import CodingError
from spikelm.registry import codings

REACH = 127
"""Largest |count| a histogram begins with: most counts fit int8."""
WINDOWS = (3, 7, 15)
"""Limits of the short windows that are reported beside the exact one: 3 unary steps; 3 and 4 bit-planes."""


@dataclass(frozen=True, kw_only=True)
class CodingStatistics:
    """One coding over one window.

    Args:
        coding: name.
        limit: largest |count| the window holds; larger ones are sent as the limit.
        steps: micro-steps of the window.
        events: events (not zero) in all micro-steps together.
        events_per_channel: events of one channel of one token, on average.
        sparsity: share of zeros over all micro-steps.
        cut: share of counts beyond the limit, which this window does not send exactly.
    """

    coding: str
    limit: int
    steps: int
    events: int
    events_per_channel: float
    sparsity: float
    cut: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class CountHistogram:
    """How often every count was sent.

    Attributes:
        bins: int64 [2 * reach + 1], from -reach to reach; the reach is 127 and doubles where it must.
    """

    def __init__(self, reach: int = REACH) -> None:
        """Empty."""
        self.bins = torch.zeros(2 * reach + 1, dtype=torch.int64)

    @property
    def reach(self) -> int:
        """Largest magnitude that has a bin."""
        return len(self.bins) // 2

    @torch.no_grad()
    def add(self, counts: Tensor) -> None:
        """Add counts of any shape.

        Raises:
            CodingError: a count beyond 2^15 or one that is not finite.
        """
        if counts.numel() == 0:
            return
        # NaN fails the comparison.
        largest = float(counts.detach().abs().amax())
        if not largest <= LARGEST_LIMIT:
            raise CodingError(
                f"a count is {largest:g} in magnitude; expected at most {LARGEST_LIMIT}: is the input NaN?"
            )
        while self.reach < largest:
            self._widen(2 * self.reach)
        index = counts.detach().to(torch.int64).flatten() + self.reach
        self.bins = self.bins + torch.bincount(index, minlength=len(self.bins)).to("cpu")

    def _widen(self, reach: int) -> None:
        wider = torch.zeros(2 * reach + 1, dtype=torch.int64)
        wider[reach - self.reach : reach + self.reach + 1] = self.bins
        self.bins = wider

    def merged(self, other: CountHistogram) -> CountHistogram:
        """Both together."""
        result = CountHistogram(max(self.reach, other.reach))
        for part in (self, other):
            offset = result.reach - part.reach
            result.bins[offset : offset + len(part.bins)] += part.bins
        return result

    @property
    def values(self) -> Tensor:
        """The count of every bin, int64."""
        return torch.arange(-self.reach, self.reach + 1)

    @property
    def total(self) -> int:
        """Counts added, zeros included."""
        return int(self.bins.sum())

    @property
    def needed(self) -> int:
        """Largest magnitude that occurred, at least 1."""
        seen = self.values[self.bins > 0]
        return max(1, int(seen.abs().max())) if len(seen) else 1

    @property
    def silent(self) -> float:
        """Share of counts that are zero."""
        return self._share(self.values == 0)

    @property
    def negative(self) -> bool:
        """Whether any count is below zero."""
        return bool(self.bins[: self.reach].any())

    @property
    def mean_magnitude(self) -> float:
        """Mean |count|, zeros included."""
        return self._mean(self.values.abs())

    @property
    def ones_per_count(self) -> float:
        """One-bits of |count|, on average over all counts, zeros included: the events of bidirectional."""
        return self._mean(ones(self.values))

    def within(self, limit: int) -> float:
        """Share of counts with |count| <= limit."""
        return self._share(self.values.abs() <= limit)

    def statistics(self, coding: Coding, limit: int | None = None) -> CodingStatistics | None:
        """What ``coding`` sends in the window of ``limit`` (by default the largest count that occurred).

        Returns:
            None where the coding has no code for a count that occurred (negative counts, unsigned coding).
        """
        if self.negative and not coding.signed:
            return None
        limit = self.needed if limit is None else limit
        # Counts that did not occur may have no code.
        sent = torch.where(self.bins > 0, self.values.clamp(-limit, limit), 0)
        fired = torch.zeros(len(sent), dtype=torch.int64)
        for events, _ in coding.planes(sent, limit):
            fired += events != 0
        steps, total = coding.steps(limit), max(self.total, 1)
        events_sent = int((fired * self.bins).sum())
        return CodingStatistics(
            coding=coding.name,
            limit=limit,
            steps=steps,
            events=events_sent,
            events_per_channel=events_sent / total,
            sparsity=1.0 - events_sent / (total * steps),
            cut=self._share(self.values.abs() > limit),
        )

    def _mean(self, values: Tensor) -> float:
        return float((values * self.bins).sum()) / max(self.total, 1)

    def _share(self, mask: Tensor) -> float:
        return float(self.bins[mask].sum()) / max(self.total, 1)


def ones(counts: Tensor) -> Tensor:
    """One-bits of |count|, int64 [..]; counts are whole numbers up to 2^15 in magnitude."""
    magnitude = counts.to(torch.int64).abs()
    return torch.stack([(magnitude >> step) & 1 for step in range(16)]).sum(0)


def report(histogram: CountHistogram) -> dict[str, Any]:
    """Every registered coding, each over the exact window and the short ones.

    Returns:
        name -> {"exact": figures, "windows": {"3": figures, ...}}, or name -> {"not_applicable": sentence}.
    """
    result: dict[str, Any] = {}
    for name in codings.names():
        coding = build_coding(name)
        exact = histogram.statistics(coding)
        if exact is None:
            result[name] = {"not_applicable": f"{name} has no code for negative counts"}
            continue
        windows = {
            str(limit): found.to_dict()
            for limit in WINDOWS
            if (found := histogram.statistics(coding, limit)) is not None
        }
        result[name] = {"exact": exact.to_dict(), "windows": windows}
    return result
