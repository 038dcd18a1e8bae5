"""Tasks after RULER (Hsieh et al., arXiv:2404.06654) that need no download.

Names and set-ups are RULER's (``niah_*``, ``vt``, ``cwe``, ``fwe``); its essays, word lists and question sets
would have to be downloaded, so the haystack is a text of yours and words are made up, and the numbers are not
comparable with published ones. A score is the share of the wanted strings that the continuation contains.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from spikelm.evaluation.longcontext.prompt import (
    Haystack,
    Prompt,
    different,
    fitted,
    hidden,
    made_word,
    noise,
)
from spikelm.tokenizer import Tokenizer

Kind = Callable[[random.Random, int, Tokenizer, Haystack], Prompt]


@dataclass(frozen=True, kw_only=True)
class Niah:
    """One of RULER's needle tasks.

    Args:
        haystack: ``noise``, ``text``, or ``needles`` (every sentence is a needle with a key of its own).
        keys: ``words`` or ``uuids``.
        values: ``numbers`` or ``uuids``.
        hidden: keys that are hidden (with ``needles``: besides the haystack's).
        per_key: values of every key.
        asked: keys that are asked for.
    """

    haystack: Literal["noise", "text", "needles"] = "text"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    hidden: int = 1
    per_key: int = 1
    asked: int = 1

    def __call__(self, rng: random.Random, length: int, tokenizer: Tokenizer, haystack: Haystack) -> Prompt:
        """One prompt."""
        seed = rng.getrandbits(64)
        keys = different(rng, self.hidden, self._key)
        needles = [(key, value) for key in keys for value in different(rng, self.per_key, self._value)]
        placed = [(rng.random(), self._sentence(key, value)) for key, value in needles]
        take = haystack.take(rng) if self.haystack == "text" else noise
        asked = ", ".join(keys[: self.asked])
        kind = "numbers" if self.values == "numbers" else "uuids"

        def build(n: int) -> str:
            filler = (
                self._distractors(random.Random(seed), n, keys) if self.haystack == "needles" else take(n)
            )
            return (
                f"Some special magic {kind} are hidden within the following text. Make sure to memorize "
                f"them. I will quiz you about them afterwards.\n{hidden(filler, placed)}\n"
                f"What are all the special magic {kind} for {asked} mentioned in the provided text? "
                f"The special magic {kind} for {asked} mentioned in the provided text are"
            )

        text, tokens = fitted(tokenizer, length, build)
        wanted = tuple(value for key, value in needles if key in keys[: self.asked])
        return Prompt(text=text, tokens=tokens, answers=wanted)

    def _distractors(self, rng: random.Random, n: int, taken: list[str]) -> list[str]:
        found: list[str] = []
        while len(found) < n:
            key = self._key(rng)
            if key not in taken:
                found.append(self._sentence(key, self._value(rng)))
        return found

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _key(self, rng: random.Random) -> str:
        return _uuid(rng) if self.keys == "uuids" else f"{made_word(rng)}-{made_word(rng)}"

    def _value(self, rng: random.Random) -> str:
        return _uuid(rng) if self.values == "uuids" else str(rng.randrange(1_000_000, 10_000_000))


def tracing(rng: random.Random, length: int, tokenizer: Tokenizer, haystack: Haystack) -> Prompt:
    """``vt``: a value passed on through five variables in noise; all five are asked for."""
    names = different(rng, 5, lambda r: "".join(r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5)))
    value = str(rng.randrange(10_000, 100_000))
    depths = sorted(rng.random() for _ in names)
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {new} = VAR {old}." for old, new in zip(names[:-1], names[1:], strict=True)]

    def build(n: int) -> str:
        return (
            "Memorize and track the chain of variable assignment hidden in the following text.\n"
            f"{hidden(noise(n), zip(depths, lines, strict=True))}\n"
            f"Question: Find all variables that are assigned the value {value} in the text above. Answer: "
            "According to the chain of variable assignment in the text above, 5 variables are assigned the "
            f"value {value}, they are:"
        )

    text, tokens = fitted(tokenizer, length, build)
    return Prompt(text=text, tokens=tokens, answers=tuple(names))


def common_words(rng: random.Random, length: int, tokenizer: Tokenizer, haystack: Haystack) -> Prompt:
    """``cwe``: a list in which ten words are common; they are asked for.

    The ten stand 30 times and all others 3 times, as in RULER; 6 times and once where the length has no room
    for that.
    """
    common, seed = different(rng, 10, made_word), rng.getrandbits(64)

    def builder(often: int, seldom: int) -> Callable[[int], str]:
        def build(n: int) -> str:
            own = random.Random(seed)
            others = [word for word in different(own, n + 10, made_word) if word not in common][:n]
            words = common * often + others * seldom
            own.shuffle(words)
            listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
            return (
                "Below is a numbered list of words. In these words, some appear more often than others. "
                f"Memorize the ones that appear most often.\n{listed}\n"
                "Question: What are the 10 most common words in the above list? "
                "Answer: The top 10 words that appear most often in the list are:"
            )

        return build

    roomy = len(tokenizer.encode(builder(30, 3)(10))) <= length
    text, tokens = fitted(tokenizer, length, builder(30, 3) if roomy else builder(6, 1), least=10)
    return Prompt(text=text, tokens=tokens, answers=tuple(common))


def frequent_words(rng: random.Random, length: int, tokenizer: Tokenizer, haystack: Haystack) -> Prompt:
    """``fwe``: coded text whose words follow Zipf's law, exponent 2; the three most frequent are wanted."""
    words, seed = different(rng, 200, made_word), rng.getrandbits(64)
    share = [1.0 / rank**2 for rank in range(1, len(words) + 1)]
    total = sum(share)

    def build(n: int) -> str:
        coded = [w for w, s in zip(words, share, strict=True) for _ in range(round(n * s / total))]
        random.Random(seed).shuffle(coded)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most "
            f"frequently appeared coded words.\n{' '.join(coded)}\n"
            "Question: What are the three most frequently appeared words in the above coded text? "
            "Answer: According to the coded text above, the three most frequently appeared words are:"
        )

    text, tokens = fitted(tokenizer, length, build, least=60)
    return Prompt(text=text, tokens=tokens, answers=tuple(words[:3]))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


RULER: Mapping[str, Kind] = {
    "niah_single_1": Niah(haystack="noise"),
    "niah_single_2": Niah(),
    "niah_single_3": Niah(values="uuids"),
    "niah_multikey_1": Niah(hidden=4),
    "niah_multikey_2": Niah(haystack="needles"),
    "niah_multikey_3": Niah(haystack="needles", keys="uuids", values="uuids"),
    "niah_multivalue": Niah(per_key=4),
    "niah_multiquery": Niah(hidden=4, asked=4),
    "vt": tracing,
    "cwe": common_words,
    "fwe": frequent_words,
}
"""RULER's name -> what makes a prompt of it."""
