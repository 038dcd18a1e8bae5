"""Accuracy by length (and depth) of what a model remembers, in memory that does not depend on the length.

Prompts are made for one batch at a time and read in chunks with the state carried; the answer is written
greedily. A length of a million tokens needs the memory of a chunk, the prompt's ids and one state per row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from spikelm.errors import ConfigError, nearest
from spikelm.evaluation.longcontext.mqar import pairs_for, recall
from spikelm.evaluation.longcontext.needle import needle, passkey
from spikelm.evaluation.longcontext.prompt import Haystack, Prompt
from spikelm.evaluation.longcontext.ruler import RULER, Kind
from spikelm.evaluation.tasks.reader import Reader
from spikelm.evaluation.tasks.writing import Request, write
from spikelm.sampling import Sampler
from spikelm.tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where needles are put: 0 is the beginning of the text."""
SLACK = 16
"""Tokens that an answer may have besides twice those of the expected one."""
KINDS = ("passkey", "needle", "mqar", *RULER)
"""What can be measured; ``ruler`` stands for all of RULER's."""

_T = TypeVar("_T")
_PROMPTS: Mapping[str, Kind] = {"passkey": passkey, **RULER}


def parse_kinds(text: str) -> tuple[str, ...]:
    """``"passkey,ruler"`` -> ("passkey", "niah_single_1", ...); raises ConfigError for unknown ones."""
    names: list[str] = []
    for word in (part.strip() for part in text.split(",") if part.strip()):
        if word not in (*KINDS, "ruler"):
            raise ConfigError(nearest("long-context task", word, (*KINDS, "ruler")))
        names += RULER if word == "ruler" else [word]
    if not names:
        raise ConfigError(f"no long-context task is named; known: {', '.join((*KINDS, 'ruler'))}")
    return tuple(dict.fromkeys(names))


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"1k,4096"`` -> (1024, 4096), ascending; raises ConfigError for what is no positive whole number."""
    found = []
    for word in (part.strip().lower() for part in text.split(",") if part.strip()):
        factor = {"k": 1 << 10, "m": 1 << 20}.get(word[-1], 1)
        digits = word if factor == 1 else word[:-1]
        if not digits.isdecimal() or int(digits) < 1:
            raise ConfigError(f"length {word!r}; expected a positive number of tokens: 4096, 4k, 1m")
        found.append(int(digits) * factor)
    if not found:
        raise ConfigError("no length is given; expected tokens, such as 1k,4k,16k")
    return tuple(sorted(set(found)))


def measure_recall(reader: Reader, length: int, *, samples: int, seed: int) -> dict[str, Any]:
    """Associative recall at one length; needs no tokenizer.

    Args:
        reader: holds the model.
        length: tokens of a sequence.
        samples: sequences.
        seed: of the sequences.

    Returns:
        length, depth (None), accuracy over all queries, stderr over sequences, n (sequences), pairs.
    """
    pairs = pairs_for(length, reader.vocab_size)
    shares: list[float] = []
    for group in _grouped(range(samples), reader.batch_size):
        drawn = [
            recall(np.random.default_rng([seed, length, i]), length, reader.vocab_size, pairs) for i in group
        ]
        said = reader.likeliest([one.tokens for one in drawn], [one.places for one in drawn])
        shares += [float((a == one.values).mean()) for a, one in zip(said, drawn, strict=True)]
    return {**_cell(length, None, shares), "pairs": pairs}


def measure_prompts(
    reader: Reader,
    tokenizer: Tokenizer,
    kind: str,
    length: int,
    *,
    samples: int,
    seed: int,
    haystack: Haystack,
    depths: Sequence[float] = DEPTHS,
) -> list[dict[str, Any]]:
    """One kind of question at one length.

    Args:
        reader: holds the model.
        tokenizer: the model's.
        kind: one of :data:`KINDS`, not ``mqar``.
        length: tokens of a prompt at most.
        samples: prompts (of every depth).
        seed: of the prompts: the same seed gives the same prompts, whatever else is measured.
        haystack: real text, for kinds that hide something in it.
        depths: of ``needle``.

    Returns:
        length, depth (None but for ``needle``), accuracy, stderr, n, tokens (mean of a prompt) of every cell.

    Raises:
        DataError: the length has no room for the task.
    """
    cells: dict[float | None, list[float]] = {}
    sizes: dict[float | None, list[int]] = {}
    asked = [(i, depth) for i in range(samples) for depth in (depths if kind == "needle" else (None,))]
    for group in _grouped(asked, reader.batch_size):
        prompts = [make_prompt(kind, i, depth, length, tokenizer, seed, haystack) for i, depth in group]
        requests = [
            Request(
                tokens=prompt.tokens,
                sampler=Sampler(temperature=0.0, seed=0),
                max_tokens=2 * len(tokenizer.encode(", ".join(prompt.answers))) + SLACK,
            )
            for prompt in prompts
        ]
        for (_, depth), prompt, text in zip(group, prompts, write(reader, tokenizer, requests), strict=True):
            cells.setdefault(depth, []).append(score(kind, prompt, text))
            sizes.setdefault(depth, []).append(len(prompt.tokens))
    return [
        {**_cell(length, depth, shares), "tokens": sum(sizes[depth]) / len(sizes[depth])}
        for depth, shares in cells.items()
    ]


def score(kind: str, prompt: Prompt, text: str) -> float:
    """How right a continuation is.

    ``passkey`` and ``needle``: 1 if it begins with the answer, else 0. RULER's kinds: the share of the wanted
    strings that it contains anywhere, whatever their case.
    """
    if kind in ("passkey", "needle"):
        return float(text.strip().startswith(prompt.answers[0]))
    lowered = text.lower()
    return sum(answer.lower() in lowered for answer in prompt.answers) / len(prompt.answers)


def make_prompt(
    kind: str,
    number: int,
    depth: float | None,
    length: int,
    tokenizer: Tokenizer,
    seed: int,
    haystack: Haystack,
) -> Prompt:
    """The prompt of a number: the same for the same arguments, whatever else is made.

    Args:
        kind: one of :data:`KINDS`, not ``mqar``.
        number: which one, from 0 on.
        depth: of ``needle``.
        length: tokens at most.
        tokenizer: counts them.
        seed: another seed gives other prompts.
        haystack: real text.

    Raises:
        DataError: the length has no room for the task.
    """
    # Prompts of one number differ in depth alone, so that depths are compared on the same text.
    rng = random.Random(f"{seed}/{kind}/{length}/{number}")
    if kind == "needle":
        return needle(rng, length, tokenizer, haystack, 0.0 if depth is None else depth)
    return _PROMPTS[kind](rng, length, tokenizer, haystack)


def _cell(length: int, depth: float | None, shares: Sequence[float]) -> dict[str, Any]:
    n = len(shares)
    mean = sum(shares) / n
    variance = sum((share - mean) ** 2 for share in shares) / (n - 1) if n > 1 else None
    stderr = None if variance is None else math.sqrt(variance / n)
    return {"length": length, "depth": depth, "accuracy": mean, "stderr": stderr, "n": n}


def _grouped(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
