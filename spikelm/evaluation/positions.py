"""Loss by position: how much a model gains from what it has read, with the standard error of every point.

The position of a token is the number of tokens that the model has seen since its initial state: in carried
mode its place in the document, in windows its place in the window. Bins are powers of two.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from spikelm.evaluation.figures import BLOCK, MIN_DOCUMENTS, ratio_stderr
from spikelm.evaluation.scoring import Scores


class PositionTally:
    """Adds up scores by position, in memory that grows with a 512th of the tokens."""

    def __init__(self) -> None:
        # (document, where the state began, cell) -> [nats, tokens]; a cell is a bin, from BLOCK on a block.
        self._cells: dict[tuple[int, int, int], list[float]] = {}

    def add(self, scores: Scores) -> None:
        """Count scored targets of one document."""
        start = scores.first - scores.context
        positions = np.arange(scores.context, scores.context + len(scores.nats))
        small = np.frexp(positions.astype(np.float64))[1] - 1
        # Bins below BLOCK are numbered downwards from -1, blocks upwards from 1.
        cells = np.where(positions < BLOCK, -1 - small, positions // BLOCK)
        for cell in np.unique(cells):
            inside = cells == cell
            entry = self._cells.setdefault((scores.document, start, int(cell)), [0.0, 0.0])
            entry[0] += float(scores.nats[inside].sum())
            entry[1] += float(inside.sum())

    def summary(self) -> list[dict[str, Any]]:
        """The curve.

        Returns:
            Per bin {from, to (positions, inclusive), tokens, nats_per_token, stderr, units, n}. The standard
            error is over documents from :data:`MIN_DOCUMENTS` on, else over windows or blocks of at most
            512 tokens; None for a single one.
        """
        bins: dict[int, dict[tuple[int, int, int], list[float]]] = defaultdict(dict)
        for key, entry in self._cells.items():
            cell = key[2]
            power = -1 - cell if cell < 0 else int(np.log2(cell * BLOCK))
            bins[power][key] = entry
        found = []
        for power in sorted(bins):
            cells = bins[power]
            documents: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
            for (document, _, _), (nats, tokens) in cells.items():
                documents[document][0] += nats
                documents[document][1] += tokens
            many = len(documents) >= MIN_DOCUMENTS
            values = np.array(list(documents.values() if many else cells.values()))
            found.append(
                {
                    "from": 2**power,
                    "to": 2 ** (power + 1) - 1,
                    "tokens": int(values[:, 1].sum()),
                    "nats_per_token": float(values[:, 0].sum() / values[:, 1].sum()),
                    "stderr": ratio_stderr(values[:, 0], values[:, 1]),
                    "units": "documents" if many else "blocks",
                    "n": len(values),
                }
            )
        return found
