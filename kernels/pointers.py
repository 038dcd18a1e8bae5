"""How tensors and thread counts reach C."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements below which starting a second thread costs more than it saves.
SERIAL_BELOW = 1 << 15


def address(tensor: Tensor | None) -> int | None:
    """Address of a contiguous CPU tensor's data; None stays the null pointer."""
    return None if tensor is None else tensor.data_ptr()


def contiguous_mask(mask: Tensor | None) -> Tensor | None:
    """A boolean mask laid out row after row, one byte each."""
    return None if mask is None else mask.contiguous()


def threads_for(work: Tensor) -> int:
    """Threads to ask of OpenMP for a pass over this tensor: torch's number, or one when it is small.

    One thread starts no team at all, so that a forked data-loading worker cannot hang on its parent's team.
    """
    return 1 if work.numel() < SERIAL_BELOW else torch.get_num_threads()
