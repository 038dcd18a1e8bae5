"""A meter that also keeps a histogram of the counts of every projection, and tells what codings send."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spikelm.codings.statistics import CountHistogram, report
from spikelm.meter import Meter


@dataclass
class CountMeter(Meter):
    """Spike statistics per projection, with every coding's micro-steps.

    Attributes:
        histograms: path -> counts of a projection whose input are spikes.
    """

    histograms: dict[str, CountHistogram] = field(default_factory=dict)

    def record(
        self, path: str, x: Tensor, *, spiking: bool, out_features: int, valid: Tensor | None, cap: int | None
    ) -> None:
        """Add one call of a projection; see :class:`spikelm.meter.Meter`."""
        super().record(path, x, spiking=spiking, out_features=out_features, valid=valid, cap=cap)
        if not spiking or path in self.outside:
            return
        rows = x if valid is None or x.dim() != 3 else x[valid]
        self.histograms.setdefault(path, CountHistogram()).add(rows)

    def total_histogram(self) -> CountHistogram:
        """The counts of all projections together."""
        total = CountHistogram()
        for histogram in self.histograms.values():
            total = total.merged(histogram)
        return total

    def summary(self) -> dict[str, Any]:
        """The meter's summary, with ``codings`` for every spiking projection and for all counts together."""
        result = super().summary()
        for path, histogram in self.histograms.items():
            result["projections"][path]["codings"] = report(histogram)
        result["codings"] = report(self.total_histogram()) if self.histograms else {}
        return result
