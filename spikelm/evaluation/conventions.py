"""The same nats divided by what others divide by: characters, words and bytes of an original page."""

from __future__ import annotations

import math
from typing import Any

from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.figures import Figure
from spikelm.evaluation.standard import Text


def other_units(figure: Figure, corpus: Corpus, text: Text) -> dict[str, Any]:
    """Further keys of a figure.

    Args:
        figure: over all of the corpus.
        corpus: its text as the model read it.
        text: where it comes from.

    Returns:
        ``characters`` and ``bits_per_character`` (Unicode characters of the scored text); for WikiText also
        ``original``, as lm-evaluation-harness counts: {words, bytes, word_perplexity, byte_perplexity,
        bits_per_byte, complete}. Its nats are those of whole pages; without a start token the first token
        of a page is not among them, the figures are a little too low, and ``complete`` is false.
    """
    found: dict[str, Any] = {}
    if corpus.characters:
        found["characters"] = corpus.characters
        found["bits_per_character"] = figure.nats / corpus.characters / math.log(2)
    if text.words and text.bytes:
        found["original"] = {
            "words": text.words,
            "bytes": text.bytes,
            "word_perplexity": math.exp(min(figure.nats / text.words, 700.0)),
            "byte_perplexity": math.exp(min(figure.nats / text.bytes, 700.0)),
            "bits_per_byte": figure.nats / text.bytes / math.log(2),
            "complete": corpus.start_token is not None,
        }
    return found
