"""Memory for weights and states that is backed by huge pages where the system gives them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE = 1 << 21
LINE = 64


class Arena:
    """One zeroed allocation from which tensors are cut.

    Args:
        size: bytes; every tensor takes its own size rounded up to a cache line.
    """

    def __init__(self, size: int) -> None:
        self._pages = mmap.mmap(-1, max(size, 1) + HUGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A hint: where it is refused the pages are small ones.
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        start = torch.frombuffer(self._pages, dtype=torch.uint8, count=1).data_ptr()
        self._used = -start % HUGE

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros of their own storage, which keeps the allocation alive."""
        numbers = 1
        for size in shape:
            numbers *= size
        if numbers == 0:
            return torch.zeros(shape, dtype=dtype)
        at, self._used = self._used, self._used + aligned(numbers * dtype.itemsize)
        return torch.frombuffer(self._pages, dtype=dtype, count=numbers, offset=at).view(shape)


def aligned(size: int) -> int:
    """Bytes rounded up to a cache line."""
    return -(-size // LINE) * LINE
