"""Which samples a step uses, and in which pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikelm.loss import IGNORE_INDEX
from spikelm.randomness import CounterRandom

if TYPE_CHECKING:
    from spikelm.data.samples import Samples


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A piece of a step's samples.

    Attributes:
        inputs, targets: int64 [B, T] (targets -100 where there is nothing to predict).
        reset: bool [B, T], true where a document begins.
        first: global number of the first sample; the others follow.
        count: targets that count.
        nbytes: UTF-8 bytes that the counted targets stand for.
    """

    inputs: Tensor
    targets: Tensor
    reset: Tensor
    first: int
    count: int
    nbytes: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same piece on another device."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            inputs=self.inputs.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            reset=self.reset.to(device, non_blocking=True),
        )

    def random(self, seed: int) -> CounterRandom:
        """Random source of these samples: the same in whatever pieces a step is computed."""
        rows, length = self.inputs.shape
        device = self.inputs.device
        return CounterRandom(
            seed=seed,
            stream=torch.arange(self.first, self.first + rows, device=device),
            position=torch.arange(length, device=device).expand(rows, length),
        )

    @property
    def last(self) -> int:
        """Global number of the last sample."""
        return self.first + len(self.inputs) - 1


def pieces(
    first: int, samples: int, parts: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, int]]:
    """(first sample, number) of a rank's pieces, when samples are cut into ``parts`` for each of the ranks.

    Sizes differ by one at most, and a rank's pieces follow one another.
    """
    whole = parts * world_size
    for part in range(rank * parts, (rank + 1) * parts):
        start, stop = samples * part // whole, samples * (part + 1) // whole
        yield first + start, stop - start


def micro_batches(
    blocks: Samples, seed: int, first: int, samples: int, parts: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """A rank's share of one step; the order of samples depends on (seed, global sample index) alone."""
    found = []
    for start, number in pieces(first, samples, parts, rank, world_size):
        batch = blocks.batch(seed, start, number)
        found.append(
            MicroBatch(
                inputs=batch.inputs,
                targets=batch.targets,
                reset=batch.reset,
                first=start,
                count=int((batch.targets != IGNORE_INDEX).sum()),
                nbytes=int(batch.target_bytes.sum()),
            )
        )
    return found


def describe(batches: Sequence[MicroBatch]) -> str:
    """The samples in words, for errors."""
    return f"samples {batches[0].first} to {batches[-1].last}"
