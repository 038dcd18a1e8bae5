"""Perplexity by length: one long stream read with the state carried on, up to a million tokens and beyond.

The documents of a text are read as one stream (a long book, or books one after another). For a length N the
figures are of the first N tokens that are predicted, and of the last half of them, each of which has at
least N/2 tokens before it. Text differs from place to place, so the same half is also read in windows that
begin from nothing every W tokens: what the long state is worth is the difference of the two.

Memory is that of one chunk and one state; only the tokens of the text (four bytes each) and their lengths
grow with N. A part whose state grows (full attention) is the exception, and ``state_bytes`` tells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spikelm.errors import ConfigError, DataError
from spikelm.evaluation import segments
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.figures import BLOCK, ratio_stderr
from spikelm.evaluation.scoring import LanguageModel, score
from spikelm.state import state_bytes

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"1k,4k,1M"`` -> (1024, 4096, 1048576): k is 1024 and M is 1024 k, as lengths of contexts are told.

    Raises:
        ConfigError: it is not a list of positive lengths.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)([km]?)\s*", part, re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            raise ConfigError(f"length {part!r}; expected positive numbers as in 1024,4k,1M")
        found.append(int(match[1]) * _UNITS[match[2].lower()])
    return tuple(sorted(set(found)))


def check_lengths(corpus: Corpus, lengths: Sequence[int]) -> None:
    """Refuse a text that is too short.

    Raises:
        DataError: it has fewer tokens than the longest length needs.
    """
    total = sum(len(tokens) for tokens in corpus.tokens)
    if total < lengths[-1] + 1:
        raise DataError(
            f"{corpus.name} has {total:,} tokens and the longest of --lengths needs {lengths[-1] + 1:,}; "
            "give a longer text or shorter lengths"
        )


def measure_lengths(
    model: LanguageModel,
    corpus: Corpus,
    lengths: Sequence[int],
    *,
    vocab_size: int,
    window: int = 1024,
    batch_size: int = 8,
    chunk: int = 512,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Figures at every length.

    Args:
        model: in evaluation mode.
        corpus: its documents are joined.
        lengths: ascending, in predicted tokens.
        vocab_size: width of the logits.
        window: W, tokens of a window of the comparison.
        batch_size: windows read side by side.
        chunk: tokens read at once.
        device: where the model is.
        advance: called with a number of scored tokens now and then.

    Returns:
        {window, state_bytes (of one sequence, after the longest length), points}; a point is {tokens, bytes,
        bits_per_byte, nats_per_token, perplexity_per_token, stderr, last_half}, ``last_half`` {from,
        tokens, nats_per_token, stderr, window_nats_per_token, gain, gain_stderr}. Standard errors are over
        blocks of 512 tokens, None for a single one; ``gain`` is the windows' nats per token minus those of
        carried state on the same tokens, its error that of the paired blocks.

    Raises:
        DataError: the text is too short, or a loss is not finite.
    """
    check_lengths(corpus, lengths)
    longest = lengths[-1]
    tokens, sizes = _stream(corpus, longest + 1)
    whole = [tokens]
    carried = _Blocks(longest, lengths)
    windowed = _Blocks(longest, lengths)
    for sums, stream, rows, limit in (
        (carried, segments.carried(whole), 1, longest),
        (windowed, segments.disjoint(whole, window), batch_size, min(window, longest)),
    ):
        for scores in score(
            model,
            stream,
            vocab_size=vocab_size,
            batch_size=rows,
            chunk=chunk,
            device=device,
            max_len=limit,
        ):
            sums.add(scores.first, scores.nats)
            if advance is not None:
                advance(len(scores.nats))
    points = [_point(n, carried, windowed, float(sizes[1 : n + 1].sum())) for n in lengths]
    state = model.init_state(1, device, None, longest)
    return {"window": window, "state_bytes": state_bytes(state), "points": points}


def _stream(corpus: Corpus, count: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The first ``count`` tokens of all documents together, and the bytes each stands for."""
    if len(corpus.tokens[0]) >= count:  # no copy of a long book
        return corpus.tokens[0][:count], corpus.byte_lengths[0][:count]
    tokens = np.empty(count, np.int32)
    sizes = np.empty(count, np.float64)
    filled = 0
    for ids, lengths in zip(corpus.tokens, corpus.byte_lengths, strict=True):
        take = min(len(ids), count - filled)
        tokens[filled : filled + take] = ids[:take]
        sizes[filled : filled + take] = lengths[:take]
        filled += take
    return tokens, sizes


class _Blocks:
    """Sums of nats over stretches of at most 512 predictions that no length or half of one cuts."""

    def __init__(self, longest: int, lengths: Sequence[int]) -> None:
        cuts = {*range(0, longest, BLOCK), longest, *lengths, *(n // 2 for n in lengths)}
        self.edges = np.array(sorted(cuts), dtype=np.int64)
        self.nats = np.zeros(len(self.edges) - 1)

    def add(self, first: int, nats: NDArray[np.float64]) -> None:
        """Targets ``first, first + 1, ...`` of the stream; target 1 is prediction 0."""
        at = np.arange(first - 1, first - 1 + len(nats))
        np.add.at(self.nats, np.searchsorted(self.edges, at, side="right") - 1, nats)

    def between(self, begin: int, end: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(nats, tokens) of the stretches of [begin, end)."""
        low, high = np.searchsorted(self.edges, [begin, end])
        return self.nats[low:high], np.diff(self.edges[low : high + 1]).astype(np.float64)


def _point(n: int, carried: _Blocks, windowed: _Blocks, size: float) -> dict[str, Any]:
    nats, tokens = carried.between(0, n)
    half, counts = carried.between(n // 2, n)
    reset, _ = windowed.between(n // 2, n)
    mean = float(nats.sum() / n)
    return {
        "tokens": n,
        "bytes": round(size),
        "bits_per_byte": float(nats.sum() / size / math.log(2)),
        "nats_per_token": mean,
        "perplexity_per_token": math.exp(min(mean, 700.0)),
        "stderr": ratio_stderr(nats, tokens),
        "last_half": {
            "from": n // 2,
            "tokens": int(counts.sum()),
            "nats_per_token": float(half.sum() / counts.sum()),
            "stderr": ratio_stderr(half, counts),
            "window_nats_per_token": float(reset.sum() / counts.sum()),
            "gain": float((reset - half).sum() / counts.sum()),
            "gain_stderr": ratio_stderr(reset - half, counts),
        },
    }
