"""A model reads a text while the ledger's meter watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from spikelm.energy.activity import Activity
from spikelm.energy.meter import EnergyMeter, watching
from spikelm.energy.synapses import Synapses, synapses
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation import segments
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.perplexity import check_vocabulary
from spikelm.evaluation.scoring import score
from spikelm.model import SpikeLM
from spikelm.projection import Projection


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was seen.

    Attributes:
        tokens: tokens that were read.
        batch: N of the unions.
        activity: what formulas depend on.
        synapses: every projection.
    """

    tokens: int
    batch: int
    activity: Activity
    synapses: tuple[Synapses, ...]

    def firing(self) -> dict[str, float]:
        """Path of every projection with spikes -> silent share of its inputs."""
        return {entry.path: entry.silent for entry in self.synapses if entry.spiking and entry.calls}


def read(
    model: SpikeLM,
    corpus: Corpus,
    *,
    length: int = 1024,
    batch: int = 1,
    rows: int = 8,
    chunk: int = 512,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Reading:
    """Let a model read a corpus in windows of ``length`` tokens, each from the initial state.

    Args:
        model: in evaluation mode; with a head.
        corpus: the text.
        length: tokens of a window at most.
        batch: N, tokens that a batch for the unions consists of.
        rows: windows read side by side.
        chunk: tokens of a window read at once.
        device: where the model is.
        advance: called with a number of tokens now and then, for progress.

    Raises:
        ConfigError: a length, batch, number of rows or chunk below 1.
        DataError: a token outside the vocabulary, a loss that is not finite, or fewer tokens than ``batch``.
    """
    for name, value in (("length", length), ("batch", batch), ("rows", rows), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1")
    check_vocabulary(corpus, model.config.vocab_size)
    meter = EnergyMeter(batch=batch)
    meter.tokens = corpus.predictions
    with watching(model, meter):
        for scores in score(
            model,
            segments.disjoint(corpus.tokens, length),
            vocab_size=model.config.vocab_size,
            batch_size=rows,
            chunk=max(chunk, batch),
            device=device,
            max_len=min(length, max(len(tokens) for tokens in corpus.tokens)),
            meter=meter,
        ):
            if advance is not None:
                advance(len(scores.nats))
    if batch > 1 and not any(union.groups for union in meter.unions.values()):
        raise DataError(
            f"{corpus.name} has {corpus.predictions} tokens to read, too few for a batch of {batch}; give a "
            "longer text or a smaller --batch"
        )
    contexts = [
        np.arange(1, len(segment.inputs) + 1, dtype=np.int64)
        for segment in segments.disjoint(corpus.tokens, length)
    ]
    layouts = dict(model.firing) or _measured(meter)
    entries = tuple(
        synapses(module, meter, layouts.get(path))
        for path, module in model.named_modules()
        if isinstance(module, Projection)
    )
    activity = Activity(
        contexts=np.concatenate(contexts),
        calls={entry.path: entry.calls for entry in entries},
        pairs=meter.pairs(),
    )
    return Reading(tokens=meter.tokens, batch=batch, activity=activity, synapses=entries)


def _measured(meter: EnergyMeter) -> dict[str, float]:
    """Silent shares of the projections that were seen, where the checkpoint has none of its own."""
    return {
        path: 1.0 - float(entry.nonzero) / (float(entry.tokens) * entry.in_features)
        for path, entry in meter.counts.items()
        if path not in meter.outside and float(entry.tokens)
    }
