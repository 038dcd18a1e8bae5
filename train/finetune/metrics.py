"""Figures of a classifier, from what it answered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Figures on one set.

    Attributes:
        texts: how many.
        loss: mean cross-entropy in nats.
        accuracy: share of right answers.
        stderr: standard error of the accuracy, from the number of texts (binomial).
        macro_f1: mean over the classes of the F1 score; 0 for a class that is never right.
        confusion: rows are the true classes, columns the answers.
    """

    texts: int
    loss: float
    accuracy: float
    stderr: float
    macro_f1: float
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "confusion": [list(row) for row in self.confusion]}


def measure(truth: Sequence[int], answers: Sequence[int], classes: int, nats: float) -> Metrics:
    """Figures of ``answers`` against ``truth``.

    Args:
        truth: class of every text.
        answers: answered class of every text.
        classes: how many there are.
        nats: summed cross-entropy.
    """
    confusion = [[0] * classes for _ in range(classes)]
    for true, answer in zip(truth, answers, strict=True):
        confusion[true][answer] += 1
    texts = len(truth)
    accuracy = sum(confusion[index][index] for index in range(classes)) / max(texts, 1)
    scores = []
    for index in range(classes):
        right = confusion[index][index]
        answered = sum(row[index] for row in confusion)
        # 2 TP / (2 TP + FP + FN); a class that neither occurs nor is answered counts 0, as in scikit-learn.
        scores.append(2 * right / max(answered + sum(confusion[index]), 1))
    return Metrics(
        texts=texts,
        loss=nats / max(texts, 1),
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1.0 - accuracy) / max(texts, 1)),
        macro_f1=sum(scores) / classes,
        confusion=tuple(tuple(row) for row in confusion),
    )


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1; None for one value) and standard error of several runs' figures."""
    if not values:
        return {"mean": None, "sd": None, "stderr": None}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values),
        "sd": deviation,
        "stderr": None if deviation is None else deviation / math.sqrt(len(values)),
    }
