"""Prompts of a wanted length: made of text that matters and as much filler as fits."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from spikelm.data.source import Source
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

HAYSTACK = "builtin:python-docs"
"""Text that facts are hidden in unless another is given: every Python carries it."""
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""Filler of Mohtashami and Jaggi (arXiv:2305.16300), repeated over and over."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_SHORTEST, _LONGEST = 20, 300  # characters of a sentence of the haystack
_ESTIMATES = 16


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question to a model.

    Args:
        text: what it reads.
        tokens: the same as token ids.
        answers: strings that its continuation should contain.
        depth: where the needle lies, 0 (beginning) to 1 (end), or None.
    """

    text: str
    tokens: list[int]
    answers: tuple[str, ...]
    depth: float | None = None


class Haystack:
    """Sentences to hide something in.

    Args:
        source: text; sentences of 20 to 300 characters are used, in their order, over and over.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._source = source

    @property
    def used(self) -> bool:
        """Whether the text has been read."""
        return "sentences" in self.__dict__

    @cached_property
    def sentences(self) -> list[str]:
        """All sentences.

        Raises:
            DataError: the source has none.
        """
        found = [
            sentence
            for document in self._source.documents()
            for paragraph in re.split(r"\n\s*\n", document)
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split()))
            if _SHORTEST <= len(sentence) <= _LONGEST
        ]
        if not found:
            raise DataError(
                f"{self.name} has no sentence of {_SHORTEST} to {_LONGEST} characters; give prose as haystack"
            )
        return found

    def take(self, rng: random.Random) -> Callable[[int], list[str]]:
        """A function n -> n sentences that follow one another, from a random place on."""
        start = rng.randrange(len(self.sentences))
        return lambda n: cycled(self.sentences, n, start)


def cycled(items: Sequence[str], n: int, start: int = 0) -> list[str]:
    """``n`` items from ``start`` on, beginning again at the end."""
    return [items[(start + i) % len(items)] for i in range(n)]


def noise(n: int) -> list[str]:
    """``n`` sentences of noise."""
    return cycled(NOISE, n)


def hidden(filler: Sequence[str], needles: Iterable[tuple[float, str]]) -> str:
    """Filler with needles at their depths (0 before all of it, 1 after it), separated by spaces."""
    pieces = list(filler)
    for depth, needle in sorted(needles, key=lambda item: -item[0]):
        pieces.insert(round(depth * len(filler)), needle)
    return " ".join(pieces)


def made_word(rng: random.Random, syllables: int = 3) -> str:
    """A word that stands in no dictionary, so that nobody knows it by heart: ``"bokira"``."""
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))


def different(rng: random.Random, n: int, make: Callable[[random.Random], str]) -> list[str]:
    """``n`` results of ``make``, no two alike."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[make(rng)] = None
    return list(found)


def fitted(
    tokenizer: Tokenizer, length: int, build: Callable[[int], str], least: int = 0
) -> tuple[str, list[int]]:
    """The longest ``build(n)`` of at most ``length`` tokens that a few linear estimates find.

    Args:
        tokenizer: counts.
        length: tokens at most.
        build: text with n pieces of filler; the same n gives the same text.
        least: the smallest n that makes sense.

    Returns:
        text and token ids.

    Raises:
        DataError: even ``build(least)`` is too long.
    """
    text = build(least)
    tokens = tokenizer.encode(text)
    if len(tokens) > length:
        raise DataError(
            f"{length} tokens are too few: the task alone takes {len(tokens)} tokens of this tokenizer"
        )
    best, ceiling = least, None  # the largest n known to fit, the smallest known not to
    base, per_piece, trial = len(tokens), 1.0, least + 8
    for _ in range(_ESTIMATES):
        tried_text = build(trial)
        tried = tokenizer.encode(tried_text)
        per_piece = max((len(tried) - base) / (trial - least), 1e-9)
        if len(tried) <= length:
            text, tokens, best = tried_text, tried, trial
        else:
            ceiling = trial
        if length - len(tokens) < per_piece or ceiling == best + 1:
            break
        trial = max(best + 1, trial + int((length - len(tried)) // per_piece))
        if ceiling is not None and trial >= ceiling:
            trial = (best + ceiling) // 2
    return text, tokens
