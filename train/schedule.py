"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, name: str, steps: int, lr: float, min_lr: float, warmup: int = 0, decay: float = 0.2
) -> float:
    """Learning rate of optimiser step ``step`` (the first is 0, the last ``steps - 1``).

    The warm-up is linear and reaches ``lr`` at its last step; the last step of every decaying schedule has
    ``min_lr``.

    Args:
        step: 0-based optimiser step.
        name: ``constant``; ``cosine`` and ``exponential`` fall from the end of the warm-up to the last step;
            ``wsd`` stays at ``lr`` and falls linearly over the last ``decay`` share of all steps.
        steps: steps of the run.
        lr: peak learning rate.
        min_lr: final learning rate.
        warmup: steps of warm-up.
        decay: share of the steps in which ``wsd`` falls.

    Raises:
        ValueError: an unknown name.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if name == "constant":
        return lr
    first = max(warmup, steps - round(decay * steps)) if name == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - first + 1) / max(1, steps - first)))
    if name == "wsd":
        return lr + (min_lr - lr) * progress
    if name == "cosine":
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if name == "exponential":
        # From zero an exponential never starts falling: min_lr 0 is read as a thousandth of a thousandth.
        floor = max(min_lr, lr * 1e-6)
        return float(lr * (floor / lr) ** progress)
    raise ValueError(f"unknown schedule {name!r}")
