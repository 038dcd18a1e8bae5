"""The next steps' samples, made in a background thread while the current step computes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from spikelm.train.batches import MicroBatch, micro_batches

if TYPE_CHECKING:
    from spikelm.data.samples import Samples
    from spikelm.train.config import TrainConfig
    from spikelm.train.ranks import Ranks


class Prefetch:
    """Makes this rank's micro-batches of the steps that are likely to come.

    One thread alone touches the samples, in the order in which it was asked: what :meth:`take` gives depends
    on nothing but its argument, however the trainer jumps.

    Args:
        blocks: the training samples.
        config: seed, batch size, accumulation; ``data.prefetch`` steps are made ahead (0: none, no thread).
        ranks: this process among those of the run.
    """

    def __init__(self, blocks: Samples, config: TrainConfig, ranks: Ranks) -> None:
        self._blocks, self._config, self._ranks = blocks, config, ranks
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[list[MicroBatch]]]] = deque()

    def take(self, first: int) -> list[MicroBatch]:
        """The micro-batches of the step whose samples begin at ``first``.

        Raises:
            SpikeLMError: the data cannot be read; what went wrong in the thread is raised when it is due.
        """
        depth, size = self._config.data.prefetch, self._config.batch_size
        if depth == 0:
            return self._make(first)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        # A step that was passed over is dropped; after any other jump nothing that waits is of use.
        while self._ahead and self._ahead[0][0] != first:
            self._ahead.popleft()[1].cancel()
        while len(self._ahead) <= depth:
            begin = self._ahead[-1][0] + size if self._ahead else first
            self._ahead.append((begin, self._thread.submit(self._make, begin)))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """End the thread, and those of the samples; :meth:`take` starts them again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._ahead.clear()
        self._blocks.close()

    def _make(self, first: int) -> list[MicroBatch]:
        config, ranks = self._config, self._ranks
        return micro_batches(
            self._blocks,
            config.seed,
            first,
            config.batch_size,
            config.accumulation,
            ranks.rank,
            ranks.world_size,
        )
