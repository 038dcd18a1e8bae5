"""Long documents in fixed lanes, for training that carries the state from step to step.

Truncated back-propagation through time: the documents stand one after another in an order of (seed, epoch),
cut into B lanes of equal length. Step s gives lane l its next T tokens, as sample ``s * B + l``, and a
document longer than T goes on in the next step with the state it left behind. The state starts anew where a
document begins, and where a lane's piece does, since that lies inside some document. What fills no whole step
of all lanes at the end of an epoch is left out; in the next order it is other text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spikelm.data.blocks import check_tokenizer, name_of
from spikelm.data.permutation import key, permute
from spikelm.data.samples import Batch, Int64, Samples, check_block_length, make_batch
from spikelm.data.store import TokenStore
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer


class Lanes(Samples):
    """Samples whose row r goes on where row r of the step before ended.

    Args:
        store: tokenised documents.
        tokenizer: they were tokenised with.
        block_length: tokens T of a lane in one step.
        num_lanes: samples B of a step; the trainer's batch size.

    Attributes:
        steps: steps of an epoch.

    Raises:
        DataError: the store is of another tokenizer, or has less text than one block for each lane.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, block_length: int, num_lanes: int) -> None:
        self.block_length = check_block_length(block_length)
        if isinstance(num_lanes, bool) or not isinstance(num_lanes, int) or num_lanes < 1:
            raise DataError(f"the number of lanes is {num_lanes!r}; expected a positive integer")
        check_tokenizer(store, tokenizer)
        self.store, self.tokenizer, self.num_lanes, self.carried = store, tokenizer, num_lanes, True
        self.num_tokens: int = store.index.num_tokens
        self.num_bytes: int = store.index.num_bytes
        self.steps = (self.num_tokens - 1) // (num_lanes * block_length)
        if self.steps < 1:
            raise DataError(
                f"{store.index.source} holds {self.num_tokens} tokens, fewer than a block of {block_length} "
                f"for each of {num_lanes} lanes and the token after it; give more text, a shorter block or a "
                "smaller batch_size"
            )
        self._lengths = np.diff(store.starts, append=self.num_tokens)
        self._orders: dict[tuple[int, int], tuple[Int64, Int64]] = {}

    def gather(self, seed: int, samples: Int64) -> Batch:
        """See :class:`Samples`."""
        step, lane = np.divmod(samples, self.num_lanes)
        epoch, step = np.divmod(step, self.steps)
        width = self.block_length + 1
        window = np.empty((len(samples), width), dtype=np.int64)
        begins = np.zeros((len(samples), width), dtype=bool)
        positions = (lane * self.steps + step) * self.block_length
        for row, position in enumerate(positions.tolist()):
            self._fill(seed, int(epoch[row]), position, window[row], begins[row])
        begins[step == 0, 0] = True
        return make_batch(
            window, begins, samples, self.tokenizer, self.store.index.eos_id is not None, name_of(self.store)
        )

    def _fill(
        self, seed: int, epoch: int, position: int, tokens: Int64, begins: npt.NDArray[np.bool_]
    ) -> None:
        """Tokens from ``position`` of an epoch's text on, and where documents begin among them."""
        order, ends = self._order(seed, epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        filled = 0
        while filled < len(tokens):
            document = int(order[place])
            inside = position + filled - int(ends[place] - self._lengths[document])
            if inside == 0:
                begins[filled] = True
            count = min(int(self._lengths[document]) - inside, len(tokens) - filled)
            start = int(self.store.starts[document]) + inside
            tokens[filled : filled + count] = self.store.read(start, start + count)
            filled += count
            place += 1

    def _order(self, seed: int, epoch: int) -> tuple[Int64, Int64]:
        """Documents in the order of an epoch, int64 [D], and where each ends in its text, int64 [D]."""
        found = self._orders.get((seed, epoch))
        if found is None:
            count = len(self._lengths)
            keys = np.broadcast_to(key(seed, np.array([epoch])), (count,))
            order = permute(np.arange(count), count, keys)
            found = order, np.cumsum(self._lengths[order])
            while len(self._orders) >= 2:  # the end of an epoch and the beginning of the next
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch] = found
        return found

    def fingerprint(self) -> str:
        """Hash of the tokens."""
        return self.store.index.tokens_sha256

    def describe(self) -> dict[str, Any]:
        """See :class:`Samples`."""
        return {
            "kind": "lanes",
            "source": self.store.index.source,
            "tokens": self.num_tokens,
            "documents": len(self._lengths),
            "lanes": self.num_lanes,
            "steps": self.steps,
        }

    def epochs(self, seed: int, samples: int) -> dict[str, float]:
        """See :class:`Samples`."""
        return {self.store.index.source: samples / (self.num_lanes * self.steps)}

    def __repr__(self) -> str:
        return (
            f"Lanes({self.store.index.source}, {self.num_tokens} tokens in {self.num_lanes} lanes, "
            f"{self.steps} steps of {self.block_length})"
        )
