"""LAMBADA: the last word of a passage, from the whole passage before it (Paperno et al. 2016).

As lm-evaluation-harness has it: the passage is tokenised whole, the tokens after those of the prompt are the
word, accuracy is the share of passages whose word is the likeliest token by token, and perplexity is
exp(mean over passages of -log p(word)), per word and not per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spikelm.codings import Coding
from spikelm.codings.meter import CountMeter
from spikelm.errors import DataError
from spikelm.evaluation.compare import UnitTally
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.figures import Tally
from spikelm.evaluation.perplexity import Result, check_vocabulary
from spikelm.evaluation.scoring import LanguageModel, score
from spikelm.evaluation.segments import Segment
from spikelm.meter import Meter
from spikelm.tokenizer import Tokenizer

LABEL = "last-word"


@dataclass(frozen=True, kw_only=True)
class LastWords:
    """Passages whose last word is scored.

    Args:
        corpus: the passages.
        firsts: per passage, index of the word's first token.
    """

    corpus: Corpus
    firsts: tuple[int, ...]

    @property
    def predictions(self) -> int:
        """Tokens that are scored."""
        return sum(len(t) - first for t, first in zip(self.corpus.tokens, self.firsts, strict=True))

    def segments(self) -> Iterator[Segment]:
        """Every passage, its prompt as context."""
        for index, (tokens, first) in enumerate(zip(self.corpus.tokens, self.firsts, strict=True)):
            yield Segment(document=index, first=1, inputs=tokens[:-1], targets=tokens[1:], skip=first - 1)


def last_words(
    corpus: Corpus, tokenizer: Tokenizer, passages: Sequence[str], prompts: Sequence[int]
) -> LastWords:
    """Where the last word of every passage begins in its tokens.

    Args:
        corpus: the tokenised passages.
        tokenizer: that made them.
        passages: their text.
        prompts: characters before the space before the last word.

    Raises:
        DataError: a passage has no token before the last word.
    """
    prefix = int(corpus.start_token is not None)
    heads = [passage[:end] for passage, end in zip(passages, prompts, strict=True)]
    firsts = []
    for number, ids in enumerate(tokenizer.encode_arrays(heads)):
        length = len(corpus.tokens[number])
        # Where merging joins the prompt's end and the word, the word keeps its last token at least.
        first = min(prefix + len(ids), length - 1)
        if first < 1:
            raise DataError(f"passage {number} has {length} tokens; expected some before its last word")
        firsts.append(first)
    return LastWords(corpus=corpus, firsts=tuple(firsts))


def measure_last_words(
    model: LanguageModel,
    found: LastWords,
    *,
    vocab_size: int,
    batch_size: int = 8,
    chunk: int = 512,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
    coding: Coding | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Measure a model in evaluation mode; the arguments are those of :func:`measure` for whole documents.

    Returns:
        The result with one figure, ``last-word``, over the bytes of the words (and the space before), and
        {accuracy, accuracy_stderr, perplexity, perplexity_stderr, n}.

    Raises:
        DataError: a token is outside the model's vocabulary, or a loss is not finite.
    """
    corpus = found.corpus
    check_vocabulary(corpus, vocab_size)
    meter = Meter() if coding is None else CountMeter()
    tally, shared = Tally(corpus.byte_lengths), UnitTally(corpus.byte_lengths)
    nats = np.zeros(len(corpus.tokens))
    right = np.ones(len(corpus.tokens), dtype=bool)
    for scores in score(
        model,
        found.segments(),
        vocab_size=vocab_size,
        batch_size=batch_size,
        chunk=chunk,
        device=device,
        max_len=max(len(tokens) for tokens in corpus.tokens),
        meter=meter,
        coding=coding,
        greedy=True,
    ):
        tally.add(scores)
        shared.add(scores)
        nats[scores.document] += scores.nats.sum()
        right[scores.document] &= scores.greedy is not None and bool(scores.greedy.all())
        if advance is not None:
            advance(len(scores.nats))
    result = Result(
        figures=(tally.figure(LABEL),),
        spikes=meter.summary(),
        spikes_over=LABEL,
        units={LABEL: shared.units()},
        position_over=LABEL,
    )
    perplexity = math.exp(min(float(nats.mean()), 700.0))
    error = _stderr(nats)
    return result, {
        "accuracy": float(right.mean()),
        "accuracy_stderr": _stderr(right.astype(np.float64)),
        "perplexity": perplexity,
        # The delta method: d exp(m) = exp(m) dm.
        "perplexity_stderr": None if error is None else perplexity * error,
        "n": len(nats),
    }


def _stderr(values: NDArray[np.float64]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
