"""What was seen while a model read a text: the figures that formulas of operations depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What meets in a spiking attention, per token.

    Attributes:
        written: key channels that fired, all heads together.
        read: query channels that fired.
        added: pairs of a key and a value of one head that both fired.
        gathered: pairs of a query that fired and a value channel.
    """

    written: float
    read: float
    added: float
    gathered: float


@dataclass(frozen=True, kw_only=True)
class Activity:
    """A model on a text.

    Attributes:
        contexts: int64 [n], how many tokens each token sees, itself included, if nothing is forgotten.
        calls: path of a projection -> share of the tokens that it saw.
        pairs: path of a spiking attention -> what met in it.
    """

    contexts: NDArray[np.int64]
    calls: Mapping[str, float] = field(default_factory=dict)
    pairs: Mapping[str, Pairs] = field(default_factory=dict)

    def keys(self, window: int | None = None) -> float:
        """Tokens that a token sees on average, the newest ``window`` at most."""
        seen = self.contexts if window is None else np.minimum(self.contexts, window)
        return float(seen.mean())
