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
    from spikelm.data.blocks import TokenBlocks


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


def pieces(first: int, samples: int, parts: int) -> Iterator[tuple[int, int]]:
    """(first sample, number) of ``parts`` pieces, sizes differing by one at most."""
    for part in range(parts):
        start, stop = samples * part // parts, samples * (part + 1) // parts
        yield first + start, stop - start


def micro_batches(blocks: TokenBlocks, seed: int, first: int, samples: int, parts: int) -> list[MicroBatch]:
    """The samples of one step; their order depends on (seed, global sample index) alone."""
    found = []
    for start, number in pieces(first, samples, parts):
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
