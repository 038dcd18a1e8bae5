"""What a training run gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikelm.train.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run gave.

    Attributes:
        out: folder of the run.
        checkpoint: folder of the newest checkpoint.
        step, steps: optimiser steps done and wanted.
        tokens: tokens used, over all resumes.
        seconds: time spent in training steps, over all resumes.
        tokens_per_second: ``tokens / seconds``.
        parameters: parameters of the model.
        train_loss: mean nats per token at the last log line, None before the first.
        evaluation: the last evaluation, None without validation text.
        resumed_from: step of the checkpoint the run went on from, None for a new run.
        interrupted: name of the signal that ended the run early, or None.
    """

    out: Path
    checkpoint: Path
    step: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    parameters: int
    train_loss: float | None
    evaluation: Evaluation | None
    resumed_from: int | None
    interrupted: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "out": str(self.out), "checkpoint": str(self.checkpoint)}
