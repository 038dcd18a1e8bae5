"""Several sources in one run, each with a share of the samples.

The samples come in periods of P. In each, source i has exactly c_i samples, spread evenly and at random: its
j-th stands at a random place in the j-th of c_i equal parts of the period (jittered sampling), so that a
batch has nearly the shares of the whole, and no two periods are alike. Sample g of the mixture is sample
``(g // P) * c_i + (samples of i before it in the period)`` of its source, which has an order of its own for
every epoch. All this follows from (weights, seed, g); one period of at most 65,536 entries is kept in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spikelm.data.permutation import key
from spikelm.data.samples import Batch, Int64, Samples
from spikelm.errors import DataError

LONGEST = 1 << 16
"""Most samples of a period: a share is met to 1/65,536 at worst."""
_SHORTEST = 1024  # a period costs about as much to lay out whether it has ten samples or a thousand


class Mixture(Samples):
    """Samples of several sources by weight.

    Args:
        parts: name -> samples of one block length; their tokenizers are the caller's business.
        weights: share of each in the samples, not negative; they need not add up to 1.

    Attributes:
        counts: int64 [K], samples of each source in a period.
        period: samples in a period.

    Raises:
        DataError: a weight is no share, there is no source, or the block lengths differ.
    """

    def __init__(self, parts: Mapping[str, Samples], weights: Sequence[float]) -> None:
        if len(weights) != len(parts):
            raise DataError(f"a mixture of {len(parts)} sources got {len(weights)} weights; give one to each")
        self.counts = counts(dict(zip(parts, weights, strict=True)))
        self.period = int(self.counts.sum())
        self._names, self._parts = list(parts), list(parts.values())
        lengths = {part.block_length for part in self._parts}
        if len(lengths) > 1:
            raise DataError(f"the sources of a mixture have blocks of {sorted(lengths)} tokens; expected one")
        carried = next((name for name, part in parts.items() if part.carried), None)
        if carried is not None:
            raise DataError(
                f"{carried} carries its state from sample to sample, which a mixture cannot; give one source"
            )
        self.block_length, self.carried = lengths.pop(), False
        self.num_tokens = _sum([part.num_tokens for part in self._parts])
        self.num_bytes = _sum([part.num_bytes for part in self._parts])
        self._periods: dict[tuple[int, int], tuple[npt.NDArray[np.intp], Int64]] = {}

    def gather(self, seed: int, samples: Int64) -> Batch:
        """See :class:`Samples`."""
        import torch

        source, index = self.locate(seed, samples)
        rows, batches = [], []
        for number in np.unique(source):
            mine = np.flatnonzero(source == number)
            rows.append(mine)
            batches.append(self._parts[number].gather(self.seed_of(seed, int(number)), index[mine]))
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))

        def joined(name: str) -> torch.Tensor:
            return torch.cat([getattr(batch, name) for batch in batches])[back]

        return Batch(
            inputs=joined("inputs"),
            targets=joined("targets"),
            reset=joined("reset"),
            samples=torch.from_numpy(np.array(samples, dtype=np.int64)),
            target_bytes=joined("target_bytes"),
        )

    def locate(self, seed: int, samples: Int64) -> tuple[npt.NDArray[np.intp], Int64]:
        """Which source each sample, int64 [M], comes from [M], and its number there, int64 [M]."""
        period, place = np.divmod(samples, self.period)
        source = np.empty(len(samples), dtype=np.intp)
        index = np.empty(len(samples), dtype=np.int64)
        for number in np.unique(period):
            here = period == number
            order, before = self._layout(seed, int(number))
            source[here] = order[place[here]]
            index[here] = before[place[here]] + number * self.counts[source[here]]
        return source, index

    def used(self, seed: int, samples: int) -> Int64:
        """Samples of each source among 0 to ``samples - 1``, int64 [K]."""
        period, place = divmod(samples, self.period)
        order, _ = self._layout(seed, period)
        part: Int64 = np.bincount(order[:place], minlength=len(self.counts)).astype(np.int64)
        return part + period * self.counts

    def seed_of(self, seed: int, number: int) -> int:
        """Seed of a source's own order: sources of the same length are not read in the same order."""
        return int(key(seed ^ 0x6D69_7874, np.array([number]))[0])

    def fingerprint(self) -> Any:
        """Shares and fingerprints of the sources, in their order (their names may change)."""
        return [
            [int(count), part.fingerprint()] for count, part in zip(self.counts, self._parts, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """See :class:`Samples`."""
        parts = zip(self.counts, self._parts, strict=True)
        return {
            "kind": "mixture",
            "period": self.period,
            "parts": [{"share": int(count) / self.period, **part.describe()} for count, part in parts],
        }

    def epochs(self, seed: int, samples: int) -> dict[str, float]:
        """See :class:`Samples`."""
        found: dict[str, float] = {}
        for number, used in enumerate(self.used(seed, samples)):
            found |= self._parts[number].epochs(self.seed_of(seed, number), int(used))
        return found

    def state(self, seed: int, first_sample: int) -> dict[str, Any]:
        """See :class:`Samples`; those of the sources that need one."""
        states = {}
        for number, used in enumerate(self.used(seed, first_sample)):
            state = self._parts[number].state(self.seed_of(seed, number), int(used))
            if state:
                states[str(number)] = state
        return {"parts": states} if states else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`Samples`."""
        found = state.get("parts", {})
        if not isinstance(found, Mapping) or not found.keys() <= {str(i) for i in range(len(self._parts))}:
            raise DataError("the saved position in the data is not that of this mixture; it cannot be used")
        for number, part in found.items():
            self._parts[int(number)].restore(part)

    def close(self) -> None:
        """See :class:`Samples`."""
        for part in self._parts:
            part.close()

    def _layout(self, seed: int, period: int) -> tuple[npt.NDArray[np.intp], Int64]:
        """Source of each place of a period, and how many of that source stand before it there."""
        found = self._periods.get((seed, period))
        if found is None:
            found = layout(self.counts, key(seed ^ 0x7065_7264, np.array([period]))[0])
            while len(self._periods) >= 4:  # the oldest; another thread may look at the same time
                self._periods.pop(next(iter(self._periods)), None)
            self._periods[seed, period] = found
        return found

    def __repr__(self) -> str:
        shares = zip(self._names, self.counts, strict=True)
        return "Mixture(" + ", ".join(f"{count / self.period:.4g} {name}" for name, count in shares) + ")"


def counts(weights: Mapping[str, float]) -> Int64:
    """Samples of each source in one period, int64 [K]: exact where the weights are multiples of some share.

    Raises:
        DataError: there is no source, or a weight is negative, not finite or too small, or all are zero.
    """
    if not weights:
        raise DataError("the mixture is empty; give at least one source with a weight")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise DataError(f"the weight of {name} is {weight!r}; expected a number")
        if not math.isfinite(weight) or weight < 0:
            raise DataError(f"the weight of {name} is {weight}; expected a finite number of at least 0")
    largest = max(weights.values())
    if largest == 0:
        raise DataError("all weights of the mixture are 0; give at least one source a positive weight")
    scaled = np.array(list(weights.values()), dtype=np.float64) / largest
    shares = scaled / scaled.sum()
    period = _shortest_period(shares)
    exact = shares * period
    found: Int64 = np.floor(exact + 1e-7).astype(np.int64)
    # The largest remainders get the samples that rounding down left over.
    missing = period - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:missing]] += 1
    for name, share, count in zip(weights, shares, found, strict=True):
        if share > 0 and count == 0:
            raise DataError(
                f"the weight of {name} is a share of {share:.3g}, less than one in {LONGEST} samples; "
                "raise it or leave the source out"
            )
    return found * -(-_SHORTEST // period)


def _shortest_period(shares: npt.NDArray[np.float64]) -> int:
    """Fewest samples in which every share is a whole number of them; the longest period if there is none."""
    for first in range(1, LONGEST + 1, 1024):
        exact = shares * np.arange(first, min(first + 1024, LONGEST + 1))[:, None]
        whole = np.abs(exact - np.round(exact)).max(axis=1) < 1e-7
        if whole.any():
            return first + int(np.argmax(whole))
    return LONGEST


def layout(counts: Int64, seed: np.uint64) -> tuple[npt.NDArray[np.intp], Int64]:
    """One period: the source of each place, and how many of that source stand before it.

    Args:
        counts: int64 [K], samples of each source.
        seed: of the period.

    Returns:
        [P] and int64 [P]; source k occurs ``counts[k]`` times. Among the first n places it is ``n * share``
        times, give or take ``1 + K * share``.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    jitter = key(int(seed), np.arange(len(source))) >> np.uint64(11)
    where = (rank + jitter * 2.0**-53) / counts[source]
    order = np.argsort(where, kind="stable")
    return source[order], rank[order]


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
