"""The ledger of one model: operations, bytes, estimates, measurements, verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spikelm.energy import bytes as traffic
from spikelm.energy.census import census
from spikelm.energy.estimate import bit_budget, estimate
from spikelm.energy.measured import measure, nothing
from spikelm.energy.prices import Table
from spikelm.energy.reading import read
from spikelm.energy.verdict import sentences
from spikelm.errors import ConfigError
from spikelm.evaluation.corpus import Corpus
from spikelm.model import SpikeLM

MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the ledger is asked.

    Attributes:
        length: tokens of a window of the text, each read from the initial state.
        batch: N, sequences decoded together, beside batch 1.
        on_chip: size of the on-chip memory in bytes.
        tables: price tables by name.
        shown: name of the one that the verdict speaks of.
        timed: tokens of a timed run; 0 times nothing.
        repeats: timed runs.
    """

    tables: Mapping[str, Table]
    shown: str
    length: int = 1024
    batch: int = 8
    on_chip: int = MEGABYTE
    timed: int = 128
    repeats: int = 3

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ConfigError: naming the option.
        """
        for name in ("length", "batch", "on_chip", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.timed < 0:
            raise ConfigError(f"timed is {self.timed} tokens; expected 0 (nothing is timed) or more")


def ledger(
    model: SpikeLM,
    corpus: Corpus,
    question: Question,
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """One model's entry of the JSON, see docs/energy.md.

    Args:
        model: in evaluation mode, with a head.
        corpus: the text.
        question: what to count with.
        device: where the model is.
        advance: called with a number of tokens now and then, for progress.

    Raises:
        ConfigError: a part has no formula.
        DataError: see :func:`spikelm.energy.reading.read`.
    """
    seen = read(
        model,
        corpus,
        length=question.length,
        batch=question.batch,
        device=device,
        advance=advance,
    )
    found = census(model, seen)
    of_model = traffic.sizes(model, seen, found)
    moved = {
        f"batch_{batch}": traffic.moved(of_model, seen.synapses, batch, question.on_chip)
        for batch in dict.fromkeys((1, question.batch))
    }
    timing = (
        nothing("timing was switched off")
        if question.timed == 0
        else measure(
            model,
            corpus,
            dict(model.firing) or seen.firing(),
            tokens=question.timed,
            repeats=question.repeats,
            device=device,
        )
    )
    result: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "tokens": seen.tokens,
        "bytes_per_token": corpus.bytes / seen.tokens,
        "mean_context": seen.activity.keys(),
        "operations": found.to_dict(),
        "bytes": {"rule": {"on_chip_bytes": question.on_chip, "sentence": traffic.RULE}, **moved},
        "energy": {
            name: estimate(found, moved, table, question.on_chip) for name, table in question.tables.items()
        },
        "bit_budget": bit_budget(found),
        "measured": timing,
    }
    return {**result, "verdict": sentences(result, question.shown)}
