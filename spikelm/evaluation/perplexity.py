"""Bits per byte and perplexity of a checkpoint, three ways that are never mixed.

- ``disjoint@L``: windows of L tokens side by side, each read from the initial state;
- ``strided@L/S``: windows of L tokens every S tokens, only the last S of each scored;
- ``carried``: whole documents, the state carried from the first token to the last in constant memory.

In all three, every token of every document is scored once, except a document's first token: nothing predicts
it, and its bytes are not counted either. With a start token (bos or eos) before every document it is scored
too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spikelm.codings import Coding
from spikelm.codings.meter import CountMeter
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation import segments
from spikelm.evaluation.compare import Units, UnitTally
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.figures import Figure, Tally
from spikelm.evaluation.positions import PositionTally
from spikelm.evaluation.scoring import LanguageModel, score
from spikelm.evaluation.segments import Segment
from spikelm.meter import Meter

MODES = ("disjoint", "strided", "carried")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a corpus is read.

    Args:
        modes: any of ``disjoint``, ``strided``, ``carried``.
        length: L, tokens of a window.
        stride: S, tokens by which strided windows advance.
        batch_size: rows read side by side.
        chunk: tokens of a row read at once; speed and memory only.
    """

    modes: tuple[str, ...] = MODES
    length: int = 1024
    stride: int = 512
    batch_size: int = 8
    chunk: int = 512

    def __post_init__(self) -> None:
        """Refuse unknown modes and sizes that are not positive."""
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"mode {mode!r}; expected any of {', '.join(MODES)}")
        if not self.modes:
            raise ConfigError(f"no mode given; expected any of {', '.join(MODES)}")
        for name in ("length", "stride", "batch_size", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if "strided" in self.modes and self.stride > self.length:
            raise ConfigError(
                f"stride {self.stride} is longer than length {self.length}; tokens would be left out"
            )

    def label(self, mode: str) -> str:
        """The name a figure is reported under."""
        return {
            "disjoint": f"disjoint@{self.length}",
            "strided": f"strided@{self.length}/{self.stride}",
            "carried": "carried",
        }[mode]

    def segments(self, mode: str, corpus: Corpus) -> Iterator[Segment]:
        """What is read in a mode."""
        if mode == "disjoint":
            return segments.disjoint(corpus.tokens, self.length)
        if mode == "strided":
            return segments.strided(corpus.tokens, self.length, self.stride)
        return segments.carried(corpus.tokens)

    def work(self, mode: str, corpus: Corpus) -> int:
        """Tokens the model reads in a mode, for progress."""
        return sum(len(segment.inputs) for segment in self.segments(mode, corpus))


@dataclass(frozen=True, kw_only=True)
class Result:
    """All figures of one model on one corpus.

    Args:
        figures: one per mode, in the order asked for.
        spikes: the meter's summary over the last mode that was read (see ``spikes_over``).
        spikes_over: label of that mode.
        by_position: loss by position (see :class:`PositionTally`) of carried state, or of the last mode where
            nothing was carried.
        position_over: label of that mode.
        units: label of a figure -> what the model needed per document or block, to be compared with others.
        documents: figures of every document in the last mode, in the order of the text.
    """

    figures: tuple[Figure, ...]
    spikes: dict[str, Any]
    spikes_over: str
    by_position: list[dict[str, Any]] = field(default_factory=list)
    position_over: str = ""
    units: dict[str, Units] = field(default_factory=dict)
    documents: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "figures": {figure.label: figure.to_dict() for figure in self.figures},
            "spikes": self.spikes | {"measured_over": self.spikes_over},
            "by_position": self.by_position,
            "by_position_over": self.position_over,
        }


def measure(
    model: LanguageModel,
    corpus: Corpus,
    windows: Windows,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
    coding: Coding | None = None,
) -> Result:
    """Measure a model in evaluation mode.

    Args:
        model: the core model, or anything that maps tokens and a state to logits and a state.
        corpus: what it is measured on.
        windows: how the corpus is read.
        vocab_size: width of the logits.
        device: where the model is.
        advance: called with a number of scored tokens now and then, for progress.
        coding: run expanded over its micro-steps; the result then has its statistics, too.

    Raises:
        DataError: if a token is outside the model's vocabulary, or a loss is not finite.
        CodingError: the coding has no code for a count that occurs.
    """
    check_vocabulary(corpus, vocab_size)
    figures = []
    units: dict[str, Units] = {}
    documents: list[dict[str, Any]] = []
    meter = Meter() if coding is None else CountMeter()
    positions = PositionTally()
    positioned = "carried" if "carried" in windows.modes else windows.modes[-1]
    for mode in windows.modes:
        # One mode is metered: spikes of overlapping windows would count tokens several times.
        metered = mode == windows.modes[-1]
        tally, shared = Tally(corpus.byte_lengths), UnitTally(corpus.byte_lengths)
        longest = max(len(tokens) for tokens in corpus.tokens)
        for scores in score(
            model,
            windows.segments(mode, corpus),
            vocab_size=vocab_size,
            batch_size=windows.batch_size,
            chunk=windows.chunk,
            device=device,
            max_len=longest if mode == "carried" else min(longest, windows.length),
            meter=meter if metered else None,
            coding=coding,
        ):
            tally.add(scores)
            shared.add(scores)
            if mode == positioned:
                positions.add(scores)
            if advance is not None:
                advance(len(scores.nats))
        figures.append(tally.figure(windows.label(mode)))
        units[windows.label(mode)] = shared.units()
        documents = shared.documents()
    return Result(
        figures=tuple(figures),
        spikes=meter.summary(),
        spikes_over=windows.label(windows.modes[-1]),
        by_position=positions.summary(),
        position_over=windows.label(positioned),
        units=units,
        documents=documents,
    )


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Refuse tokens the model has no embedding for.

    Raises:
        DataError: naming the highest token.
    """
    highest = max((int(tokens.max()) for tokens in corpus.tokens if len(tokens)), default=0)
    if highest >= vocab_size:
        raise DataError(
            f"{corpus.name} contains token {highest}, but the model has {vocab_size} tokens; "
            f"use the tokenizer the model was trained with"
        )


def parse_modes(text: str) -> tuple[str, ...]:
    """``"disjoint,carried"`` -> ("disjoint", "carried"); ``all`` stands for every mode."""
    names: Sequence[str] = [part.strip() for part in text.split(",") if part.strip()]
    return MODES if list(names) == ["all"] else tuple(dict.fromkeys(names))
