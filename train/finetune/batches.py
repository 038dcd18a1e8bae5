"""Texts of like length together: little padding, and an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spikelm.errors import DataError
from spikelm.randomness import CounterRandom

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.finetune.examples import Example

BUCKETS = 32
"""Batches whose texts are sorted by length together."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A set as tokens.

    Attributes:
        tokens: of every text.
        labels: class of every text.
        cut: texts that were longer than ``max_length`` and lost their end.
    """

    tokens: list[list[int]]
    labels: list[int]
    cut: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some texts.

    Attributes:
        tokens: int64 [B, T], padded on the right with token 0.
        valid: bool [B, T], false for padding; None where there is none.
        labels: int64 [B].
        index: int64 [B], place of every text in its set.
    """

    tokens: Tensor
    valid: Tensor | None
    labels: Tensor
    index: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            valid=None if self.valid is None else self.valid.to(device),
            labels=self.labels.to(device),
        )

    def random(self, seed: int, first: int) -> CounterRandom:
        """Random source of these texts: the same in whatever batch they stand.

        Args:
            seed: of the run.
            first: texts seen in the epochs before.
        """
        rows, length = self.tokens.shape
        device = self.tokens.device
        return CounterRandom(
            seed=seed,
            stream=self.index.to(device) + first,
            position=torch.arange(length, device=device).expand(rows, length),
        )


def encode(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Tokens of a set; special tokens written in a text are text.

    Raises:
        DataError: a text gives no token at all.
    """
    tokens = tokenizer.encode_batch([example.text for example in examples], parse_special=False)
    for example, ids in zip(examples, tokens, strict=True):
        if not ids:
            raise DataError(f"the text {example.text[:40]!r} gives no token with this tokenizer; remove it")
    return Encoded(
        tokens=[ids[:max_length] for ids in tokens],
        labels=[example.label for example in examples],
        cut=sum(len(ids) > max_length for ids in tokens),
    )


def training_batches(data: Encoded, size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Every text once, in the order of (seed, epoch).

    The texts are shuffled, sorted by length within groups of ``BUCKETS`` batches, and the batches shuffled.
    """
    order = np.random.default_rng([seed, epoch])
    shuffled = order.permutation(len(data))
    rows: list[np.ndarray] = []
    for start in range(0, len(shuffled), BUCKETS * size):
        group = shuffled[start : start + BUCKETS * size]
        group = group[np.argsort([len(data.tokens[i]) for i in group], kind="stable")]
        rows += [group[first : first + size] for first in range(0, len(group), size)]
    for position in order.permutation(len(rows)):
        yield collate(data, rows[position].tolist())


def ordered_batches(data: Encoded, size: int) -> Iterator[Batch]:
    """Every text once, shortest first."""
    rows = sorted(range(len(data)), key=lambda i: len(data.tokens[i]))
    for start in range(0, len(rows), size):
        yield collate(data, rows[start : start + size])


def collate(data: Encoded, rows: Sequence[int]) -> Batch:
    """The texts of ``rows`` as one batch."""
    lengths = torch.tensor([len(data.tokens[i]) for i in rows])
    width = int(lengths.max())
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, i in enumerate(rows):
        tokens[row, : len(data.tokens[i])] = torch.tensor(data.tokens[i])
    return Batch(
        tokens=tokens,
        valid=None if bool((lengths == width).all()) else torch.arange(width) < lengths[:, None],
        labels=torch.tensor([data.labels[i] for i in rows]),
        index=torch.tensor(rows),
    )
