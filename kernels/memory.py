"""Memory for weights and states that is backed by huge pages where the system gives them.

Reading weights at the memory's full speed needs huge pages: with pages of 4 KiB a stream stops at every one
of them to have its address translated.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

HUGE = 1 << 21
"""Bytes of a huge page."""
LINE = 64
"""Bytes of a cache line, to which every tensor is aligned."""


class Arena:
    """One zeroed allocation from which tensors are cut; it is freed with the last of them.

    Huge pages are asked for (``MADV_HUGEPAGE``); where the system refuses or does not know them the pages are
    small ones, without a word. An arena smaller than a huge page does not ask: it would hold a whole one.

    Args:
        size: bytes; every tensor takes its own size rounded up to a cache line.

    Attributes:
        size: bytes that tensors can take.
        used: bytes that they have taken.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = aligned(max(size, 1)), 0
        # Shared pages, mmap's default, get no huge ones.
        private: dict[str, Any] = {}
        if hasattr(mmap, "MAP_PRIVATE"):
            private = {"flags": mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0)}
        self._pages = mmap.mmap(-1, self.size + HUGE, **private)
        if self.size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._pages.madvise(mmap.MADV_HUGEPAGE)
        start = torch.frombuffer(self._pages, dtype=torch.uint8, count=1).data_ptr()
        self._first = -start % HUGE

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros of their own storage, which keeps the allocation alive.

        Args:
            shape: of the tensor.
            dtype: of its elements.

        Raises:
            MemoryError: the arena is too small.
        """
        numbers = math.prod(shape)
        if numbers == 0:
            return torch.zeros(shape, dtype=dtype)
        wanted = aligned(numbers * dtype.itemsize)
        if self.used + wanted > self.size:
            raise MemoryError(f"an arena of {self.size} bytes has {self.size - self.used} left, not {wanted}")
        at, self.used = self._first + self.used, self.used + wanted
        return torch.frombuffer(self._pages, dtype=dtype, count=numbers, offset=at).view(shape)


def aligned(size: int) -> int:
    """Bytes rounded up to a cache line."""
    return -(-size // LINE) * LINE
