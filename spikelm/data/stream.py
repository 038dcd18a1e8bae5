"""Training samples straight from a source, tokenised while the model trains; nothing is written to disk.

Block b of the source is the one that its token store would have; an epoch is a pass over the source, and
ends where the store's blocks end. Samples come in the order of the documents, or shuffled in windows: within
each N blocks that follow one another, sample g is block ``permutation(seed, epoch, window)[g % N]``, so that
one window is held in memory, and the order is still a function of the seed and the sample's number.

Samples are found by reading up to them. Asking in ascending order costs one pass; going back, or on in a new
process, begins at the last known place before (see :meth:`Stream.state`).
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from spikelm.data.packing import CHUNK, Chunk, Place, Reader
from spikelm.data.permutation import key, permute
from spikelm.data.samples import Batch, Int64, Samples, check_block_length, make_batch
from spikelm.data.source import Source
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

_MOST_PLACES = 8192


class Stream(Samples):
    """Blocks of a source that is read as it is needed.

    Args:
        source: documents, the same at every reading.
        tokenizer: how to encode them.
        block_length: tokens T of a sample.
        shuffle_buffer: blocks of a window; 0 keeps the order of the text.
        workers: processes that tokenise; 1 for a thread of this one, 0 for one per core.

    Attributes:
        num_blocks: blocks of a pass, None until its end was seen.

    Raises:
        DataError: a size is not positive.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        block_length: int,
        shuffle_buffer: int = 0,
        workers: int = 1,
    ) -> None:
        self.block_length = check_block_length(block_length)
        if isinstance(shuffle_buffer, bool) or not isinstance(shuffle_buffer, int) or shuffle_buffer < 0:
            raise DataError(
                f"shuffle_buffer is {shuffle_buffer!r}; expected a number of blocks, or 0 for none"
            )
        self.source, self.tokenizer, self.shuffle_buffer = source, tokenizer, shuffle_buffer
        self._workers = workers
        self.num_tokens = self.num_bytes = None
        self.carried = False
        self.num_blocks: int | None = None
        self._window = max(1, shuffle_buffer)
        self._lock = threading.Lock()
        self._numbers, self._places = [0], [Place()]  # chunks whose beginning is known, in ascending order
        self._kept: OrderedDict[tuple[int, int], Chunk] = OrderedDict()
        self._keep = -(-self._window // CHUNK) + 2  # a window may begin and end inside a chunk
        self._orders: dict[tuple[int, int, int], Int64] = {}
        self._reader: Reader | None = None
        self._at = (0, 0)  # epoch and chunk that the reader gives next

    def gather(self, seed: int, samples: Int64) -> Batch:
        """See :class:`Samples`."""
        rows = len(samples)
        window = np.empty((rows, self.block_length + 1), dtype=np.int64)
        begins = np.empty((rows, self.block_length + 1), dtype=bool)
        with self._lock:
            # Looked up in ascending order, so that no chunk is read twice where samples arrive mixed.
            for row in np.argsort(samples, kind="stable").tolist():
                epoch, block = self._locate(seed, int(samples[row]))
                number, inside = divmod(block, CHUNK)
                chunk = self._chunk(epoch, number)
                window[row], begins[row] = chunk.window[inside], chunk.begins[inside]
        return make_batch(
            window, begins, samples, self.tokenizer, self.tokenizer.eos_id is not None, self.source.name
        )

    def _locate(self, seed: int, sample: int) -> tuple[int, int]:
        """Epoch and block of a sample; reads on until its whole window is known to exist."""
        epoch, index = self._epoch(sample)
        first = index - index % self._window
        if self._window == 1:
            return epoch, index
        size = self._window if self.num_blocks is None else min(self._window, self.num_blocks - first)
        return epoch, first + int(self._order(seed, epoch, first // self._window, size)[index - first])

    def _order(self, seed: int, epoch: int, window: int, size: int) -> Int64:
        """The order of the blocks of a window, int64 [size]."""
        found = self._orders.get((seed, epoch, window))
        if found is None:
            keys = key(seed, np.array([epoch])) ^ key(1, np.array([window]))
            found = permute(np.arange(size), size, np.broadcast_to(keys, (size,)))
            while len(self._orders) >= 2:  # a step may lie in two windows
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch, window] = found
        return found

    def _epoch(self, sample: int) -> tuple[int, int]:
        """Epoch of a sample and its number in that epoch."""
        while self.num_blocks is None:
            last = sample - sample % self._window + self._window - 1  # block at the end of its window
            if len(self._chunk(0, last // CHUNK, optional=True).window) > last % CHUNK:
                return 0, sample
            # The pass ended before: its length is known now.
        return divmod(sample, self.num_blocks)

    def _chunk(self, epoch: int, number: int, optional: bool = False) -> Chunk:
        """A chunk of a pass; an empty one behind the end of the text where that is ``optional``.

        Raises:
            DataError: the text ends before, or not where it ended in an earlier pass.
        """
        while (found := self._kept.get((epoch, number))) is None:
            if self.num_blocks is not None and (optional or number * CHUNK >= self.num_blocks):
                return Chunk(window=_NO_TOKENS, begins=_NO_BEGINS, next=None)
            self._advance(epoch, number)
        return found

    def _advance(self, epoch: int, number: int) -> None:
        """Read one chunk on the way to ``number``."""
        if self._reader is None or self._at[0] != epoch or self._at[1] > number:
            self._stop()
            known = bisect_right(self._numbers, number) - 1
            self._reader = Reader(
                self.source, self.tokenizer, self.block_length, self._places[known], self._workers
            )
            self._at = (epoch, self._numbers[known])
        at = self._at[1]
        try:
            chunk = self._reader.next()
        except BaseException:
            self._stop()
            raise
        self._kept[epoch, at] = chunk
        self._kept.move_to_end((epoch, at))
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)
        if chunk.next is None:
            self._stop()
            self._end(at * CHUNK + len(chunk.window))
            return
        self._at = (epoch, at + 1)
        known = bisect_left(self._numbers, at + 1)
        if known == len(self._numbers) or self._numbers[known] != at + 1:
            self._numbers.insert(known, at + 1)
            self._places.insert(known, chunk.next)
            if len(self._numbers) > _MOST_PLACES:  # half of the older ones; places near the end stay dense
                half = _MOST_PLACES // 2
                del self._numbers[1:half:2], self._places[1:half:2]

    def _end(self, blocks: int) -> None:
        """A pass ended after ``blocks`` blocks."""
        name = self.source.name
        if blocks == 0:
            raise DataError(
                f"{name} holds fewer tokens than one block of {self.block_length} and the token after it; "
                "give more text or a shorter block"
            )
        if self.num_blocks is not None and self.num_blocks != blocks:
            raise DataError(
                f"{name} ended after {blocks} blocks of {self.block_length} tokens, and after "
                f"{self.num_blocks} when it was read before; a stream must give the same text every time"
            )
        self.num_blocks = blocks

    def fingerprint(self) -> Any:
        """Hash of the source's own fingerprint (path, size, date of files): no text was read yet."""
        return hashlib.sha256(self.source.fingerprint().encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """See :class:`Samples`."""
        return {"kind": "stream", "source": self.source.name, "shuffle_buffer": self.shuffle_buffer}

    def epochs(self, seed: int, samples: int) -> dict[str, float]:
        """See :class:`Samples`; below 1 it is not known before the first pass ended, and nothing is said."""
        blocks = self.num_blocks
        return {} if blocks is None else {self.source.name: samples / blocks}

    def state(self, seed: int, first_sample: int) -> dict[str, Any]:
        """Where to read on for ``first_sample``: a chunk of blocks, its document, the tokens before it there.

        The number of blocks of a pass is in it once a pass was needed.
        """
        with self._lock:
            try:
                epoch, index = self._epoch(first_sample)
                number = (index - index % self._window) // CHUNK
                known = bisect_right(self._numbers, number) - 1
                if self._numbers[known] != number and self._at <= (epoch, number - 1):
                    self._chunk(epoch, number - 1)  # it will be read anyway, and tells where the next begins
            except DataError:
                # Told when the samples are asked for; a checkpoint of what was done before need not fail.
                epoch, number = 0, self._numbers[-1]
            known = bisect_right(self._numbers, number) - 1
            place = self._places[known]
            return {
                "blocks": self.num_blocks if epoch else None,
                "chunk": self._numbers[known],
                "document": place.document,
                "offset": place.offset,
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`Samples`; an empty state reads from the start."""
        if not state:
            return
        blocks = state.get("blocks")
        chunk, document, offset = (state.get(name, -1) for name in ("chunk", "document", "offset"))
        if blocks == 0 or not all(_is_count(v) for v in (blocks or 1, chunk, document, offset)):
            raise DataError(f"the saved position in {self.source.name} is {dict(state)}; it cannot be used")
        with self._lock:
            self._stop()
            self._kept.clear()
            self._orders.clear()
            self.num_blocks = blocks
            self._numbers, self._places = [0], [Place()]
            if chunk:
                self._numbers.append(chunk)
                self._places.append(Place(document=document, offset=offset))

    def close(self) -> None:
        """See :class:`Samples`."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __del__(self) -> None:
        if getattr(self, "_reader", None) is not None:
            self._stop()

    def __repr__(self) -> str:
        return f"Stream({self.source.name}, blocks of {self.block_length}, shuffled {self.shuffle_buffer})"


_NO_TOKENS = np.empty((0, 0), dtype=np.uint16)
_NO_BEGINS = np.empty((0, 0), dtype=bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
