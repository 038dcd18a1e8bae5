"""RULER's tasks as tasks of lm-evaluation-harness, with prompts that are made here.

A name says task and length: ``ruler_vt_4096``, ``ruler_niah_single_1_16k``. The prompts are those of
:mod:`spikelm.evaluation.longcontext.measure` with the same seed; the harness asks them and scores the texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spikelm.errors import ConfigError, nearest
from spikelm.evaluation.longcontext.measure import SLACK, make_prompt, parse_lengths, score
from spikelm.evaluation.longcontext.prompt import Haystack, Prompt
from spikelm.evaluation.longcontext.ruler import RULER
from spikelm.tokenizer import Tokenizer

SAMPLES = 100
"""Prompts of a task where nobody limits them."""
_NAME = re.compile(r"ruler_(?P<kind>.+)_(?P<length>\d+[km]?)", re.IGNORECASE)


def is_ours(name: str) -> bool:
    """Whether a task's name is ``ruler_KIND_LENGTH``."""
    return _NAME.fullmatch(name) is not None


def kind_and_length(name: str) -> tuple[str, int]:
    """``"ruler_vt_4k"`` -> ("vt", 4096).

    Raises:
        ConfigError: no such kind of task, or no length.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"task {name!r}; expected ruler_KIND_LENGTH, such as ruler_vt_4k")
    if found["kind"] not in RULER:
        raise ConfigError(nearest("task of RULER", found["kind"], RULER))
    return found["kind"], parse_lengths(found["length"])[0]


def config(
    name: str, tokenizer: Tokenizer, haystack: Haystack, *, samples: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """A task as the harness's TaskManager takes it.

    Args:
        name: ``ruler_KIND_LENGTH``; the length is in tokens, and ``4k`` is 4096.
        tokenizer: the model's, which counts them.
        haystack: real text, for kinds that hide something in it.
        samples: prompts; :data:`SAMPLES` if None.
        seed: of the prompts.

    Raises:
        ConfigError: no such kind of task, or a length of 0.
    """
    kind, length = kind_and_length(name)
    numbers = range(SAMPLES if samples is None else samples)
    prompts = [make_prompt(kind, number, None, length, tokenizer, seed, haystack) for number in numbers]
    longest = max(len(tokenizer.encode(", ".join(prompt.answers))) for prompt in prompts)
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": _documents(prompts)},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answers|join(', ')}}",
        "process_results": lambda document, texts: _scored(kind, document, texts),
        "generation_kwargs": {"until": [], "max_gen_toks": 2 * longest + SLACK, "do_sample": False},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _documents(prompts: Sequence[Prompt]) -> Any:
    import datasets

    return datasets.Dataset.from_list(
        [{"text": prompt.text, "answers": list(prompt.answers)} for prompt in prompts]
    )


def _scored(kind: str, document: Mapping[str, Any], texts: Sequence[str]) -> dict[str, float]:
    prompt = Prompt(text=document["text"], tokens=[], answers=tuple(document["answers"]))
    return {"acc": score(kind, prompt, texts[0])}
