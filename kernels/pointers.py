"""How tensors and thread counts reach C."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements below which starting a second thread costs more than it saves.
SERIAL_BELOW = 1 << 15
_PLAIN = (Tensor, torch.nn.Parameter)


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


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether a C function may be called on these tensors without torch's dispatcher (0.1 ms a call).

    True where nothing records or replaces the call: no gradient is wanted, the tensors are plain ones, and
    there is no compilation, tracing, function transform or dispatch mode. Custom ops serve all other calls.
    """
    if not is_untouched(*tensors):
        return False
    return not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors)


def is_untouched(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors with values to read: nothing compiles, traces or transforms."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
    )
