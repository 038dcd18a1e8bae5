"""A fact hidden in a long text: passkey (Mohtashami and Jaggi, arXiv:2305.16300) and needle in a haystack."""

from __future__ import annotations

import random

from spikelm.evaluation.longcontext.prompt import Haystack, Prompt, fitted, hidden, made_word, noise
from spikelm.tokenizer import Tokenizer

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)


def passkey(rng: random.Random, length: int, tokenizer: Tokenizer, haystack: Haystack) -> Prompt:
    """Five digits somewhere in noise; asked for at the end. The haystack is not used."""
    key, depth = f"{rng.randrange(10_000, 100_000)}", rng.random()
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."

    def build(n: int) -> str:
        return f"{_TASK} {hidden(noise(n), [(depth, fact)])} What is the pass key? The pass key is"

    text, tokens = fitted(tokenizer, length, build)
    return Prompt(text=text, tokens=tokens, answers=(key,), depth=depth)


def needle(rng: random.Random, length: int, tokenizer: Tokenizer, haystack: Haystack, depth: float) -> Prompt:
    """A sentence with two made-up words at a given depth of real text; the second is asked for.

    Args:
        rng: draws the words and the place in the haystack.
        length: tokens of the prompt at most.
        tokenizer: the model's.
        haystack: the real text.
        depth: 0 (beginning) to 1 (end).
    """
    place, word = made_word(rng).capitalize(), made_word(rng)
    take = haystack.take(rng)
    fact = f"The secret word of {place} is {word}."

    def build(n: int) -> str:
        return f"{hidden(take(n), [(depth, fact)])} The secret word of {place} is"

    text, tokens = fitted(tokenizer, length, build)
    return Prompt(text=text, tokens=tokens, answers=(word,), depth=depth)
