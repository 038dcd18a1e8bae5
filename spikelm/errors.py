"""Errors of the package: one base, named subclasses, each message one clear sentence.

A leaf module: it imports the standard library only, so kernels may use it too. The command line prints
the message of any :class:`SpikeLMError` on one line and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpikeLMError(Exception):
    """Base of every error the package raises on purpose."""

    exit_code = 2


class ConfigError(SpikeLMError):
    """A configuration value, key or file that cannot be used."""


class DataError(SpikeLMError):
    """Text, tokens or a data file that cannot be used."""


class CheckpointError(SpikeLMError):
    """A checkpoint that is missing, incomplete, foreign or corrupted."""


class ShapeError(SpikeLMError):
    """A tensor whose shape or dtype does not fit."""


class CodingError(SpikeLMError):
    """Counts that a spike coding cannot send, or events that do not fit their weights."""


class StateError(SpikeLMError):
    """A recurrent state that does not fit the model or has overflowed."""


class KernelError(SpikeLMError):
    """A kernel back-end that was asked for and is not available, or that refused its inputs."""


class GateError(KernelError):
    """A gate or decay that is NaN or outside what its equation allows: a model or its input went wrong."""


class PlanError(KernelError):
    """A model, part or call that a decode plan cannot run."""


class TrainingError(SpikeLMError):
    """Training cannot go on, for example because the loss is not finite.

    Args:
        message: the sentence.
        rank: the rank at fault where all of them raise the same error, or None.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def nearest(kind: str, name: str, options: Iterable[str]) -> str:
    """Sentence about an unknown name that points at the closest known one.

    Args:
        kind: what the name stands for, for example ``"neuron"``.
        name: the name that was given.
        options: the names that exist.
    """
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r};{hint} known: {', '.join(known) or 'none'}"
