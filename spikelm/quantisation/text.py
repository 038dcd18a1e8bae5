"""The text of a conversion: windows to calibrate on, and others, held out, to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from spikelm.codings import Coding
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation import segments
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.figures import Figure, Tally
from spikelm.evaluation.scoring import score
from spikelm.evaluation.segments import Segment
from spikelm.meter import Meter
from spikelm.model import SpikeLM

HELD_OUT = 0.25
"""Share of the windows that are held out where no other text is given for the evaluation."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What bits per byte are measured on.

    Args:
        corpus: the text.
        windows: disjoint windows of it.
        length: tokens of a window.
        batch_size: windows read side by side.
    """

    corpus: Corpus
    windows: Sequence[Segment]
    length: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(len(window.targets) - window.skip for window in self.windows)

    def measure(self, model: SpikeLM, meter: Meter | None = None, coding: Coding | None = None) -> Figure:
        """Bits per byte of a model, every window read from the initial state.

        Raises:
            DataError: a loss is not finite.
        """
        tally = Tally(self.corpus.byte_lengths)
        for scores in score(
            model,
            self.windows,
            vocab_size=model.config.vocab_size,
            batch_size=self.batch_size,
            max_len=self.length,
            meter=meter,
            coding=coding,
            device=model.embedding.weight.device,
        ):
            tally.add(scores)
        return tally.figure(f"disjoint@{self.length}")


def split(
    corpus: Corpus, other: Corpus | None, *, samples: int, length: int, batch_size: int
) -> tuple[list[Segment], HeldOut]:
    """Windows for the calibration, evenly spread, and what is held out.

    Args:
        corpus: the calibration text.
        other: text for the evaluation; None holds out the last quarter of the windows of ``corpus``.
        samples: windows for the calibration, at most.
        length: tokens of a window.
        batch_size: windows side by side in the evaluation.

    Raises:
        ConfigError: sizes that are not positive, or windows shorter than 8 tokens.
        DataError: the text has too few windows.
    """
    least = {"samples": (samples, 1), "length": (length, 8), "batch-size": (batch_size, 1)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ConfigError(f"{name} is {value}; expected at least {smallest}")
    windows = list(segments.disjoint(corpus.tokens, length))
    if other is None:
        held = max(1, round(HELD_OUT * len(windows)))
        if len(windows) < 2:
            raise DataError(
                f"{corpus.name} has {corpus.predictions} tokens to predict, one window of {length}; expected "
                "at least two windows (one is held out): give more text, a smaller --length, or --eval SOURCE"
            )
        left, kept = windows[: len(windows) - held], windows[len(windows) - held :]
        evaluation = HeldOut(corpus=corpus, windows=kept, length=length, batch_size=batch_size)
    else:
        left = windows
        kept = list(segments.disjoint(other.tokens, length))
        evaluation = HeldOut(corpus=other, windows=kept, length=length, batch_size=batch_size)
    return _spread(left, samples), evaluation


def _spread(windows: Sequence[Segment], count: int) -> list[Segment]:
    if len(windows) <= count:
        return list(windows)
    return [windows[i * len(windows) // count] for i in range(count)]


def batches(
    windows: Iterable[Segment], size: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(inputs, targets, valid) [B, T] of windows side by side, padded on the right."""
    group: list[Segment] = []
    for window in windows:
        group.append(window)
        if len(group) == size:
            yield _stacked(group)
            group = []
    if group:
        yield _stacked(group)


def _stacked(group: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(window.inputs) for window in group)
    inputs = torch.zeros(len(group), width, dtype=torch.long)
    targets = torch.zeros_like(inputs)
    valid = torch.zeros(len(group), width, dtype=torch.bool)
    for row, window in enumerate(group):
        n = len(window.inputs)
        inputs[row, :n] = torch.from_numpy(window.inputs).long()
        targets[row, :n] = torch.from_numpy(window.targets).long()
        valid[row, :n] = True
    return inputs, targets, valid
