"""A look at records before plots and reports read them: whether they are measurements of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spikelm.errors import DataError

KINDS = ("eval", "energy", "tasks", "long-context")
"""Kinds of records with results for each model."""


def check(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse records that do not have the shape of a measurement of models.

    Raises:
        DataError: naming the record (from 1) and what is wrong.
    """
    for index, record in enumerate(records, start=1):
        kind = record.get("kind")
        if kind not in KINDS:
            raise DataError(f"record {index} has kind {kind!r}; expected one of {', '.join(KINDS)}")
        results = record.get("results")
        models = results.get("models") if isinstance(results, Mapping) else None
        if not isinstance(models, Mapping) or not all(isinstance(m, Mapping) for m in models.values()):
            raise DataError(
                f"record {index} ({kind}) has no results for each model; expected a file that --json of "
                "spikelm eval or spikelm energy wrote"
            )
