"""What recurrences in chunks of tokens (``gla``, ``gated_delta``) share on their way into C.

Both C files have three functions, ``OP_scratch``, ``OP_forward`` and ``OP_backward``, whose arguments differ
only in the sizes they begin with and in the number of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spikelm.kernels.compile import load
from spikelm.kernels.pointers import address, contiguous_mask, threads_for

CHUNK = 32
"""Tokens of a chunk, as in chunk.h."""


@dataclass(frozen=True, kw_only=True)
class ChunkedOp:
    """The C functions of one op.

    Args:
        name: what their names begin with.
        source: its C file.
        sizes: whole numbers that a call begins with: B, T, H, G, K, V and what else the op wants to know.
        inputs: tensors beside the state: q, k, v, ...
    """

    name: str
    source: Path
    sizes: int
    inputs: int

    def forward(
        self,
        sizes: Sequence[int],
        inputs: Sequence[Tensor | None],
        state: Tensor,
        scale: float,
        reset: Tensor | None,
        valid: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Output [B, T, H, V], last state [B, G, K, V], with ``keep`` states [B, G, chunks, K, V], a flag.

        The flag tells whether a gate was met that is none.
        """
        given = [None if x is None else x.contiguous() for x in inputs]
        state = state.contiguous()
        batch, steps, heads, groups, key_dim, value_dim = sizes[:6]
        o, last = state.new_empty(batch, steps, heads, value_dim), torch.empty_like(state)
        states = state.new_empty(batch, groups, -(-steps // CHUNK) if keep else 0, key_dim, value_dim)
        size = 0 if steps == 1 else _scratch_size(self, state.dtype, tuple(sizes[2:]), False)
        masks = (contiguous_mask(reset), contiguous_mask(valid))
        buffers = (o, last, states if keep else None)
        wrong = self._call("forward", sizes, scale, (*given, state, *masks, *buffers), size)
        return o, last, states, bool(wrong)

    def forward_like(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors in the shapes of what :meth:`forward` returns."""
        batch, steps, heads, _ = q.shape
        chunks = (steps + CHUNK - 1) // CHUNK if keep else 0
        groups, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
        return (
            q.new_empty(batch, steps, heads, value_dim),
            state.new_empty(state.shape),
            q.new_empty(batch, groups, chunks, key_dim, value_dim),
        )

    def backward(
        self,
        sizes: Sequence[int],
        inputs: Sequence[Tensor | None],
        states: Tensor,
        grad_o: Tensor,
        grad_state: Tensor,
        scale: float,
        reset: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of the inputs (None where there is none) and of the incoming state; shapes as theirs."""
        given = [None if x is None else x.contiguous() for x in inputs]
        states, grad_o, grad_state = states.contiguous(), grad_o.contiguous(), grad_state.contiguous()
        grads = [None if x is None else torch.empty_like(x) for x in given]
        first = torch.empty_like(grad_state)
        size = _scratch_size(self, states.dtype, tuple(sizes[2:]), True)
        masks = (contiguous_mask(reset), contiguous_mask(valid))
        tensors = (*given, *masks, states, grad_o, grad_state, *grads, first)
        self._call("backward", sizes, scale, tensors, size)
        return grads, first

    def _call(
        self, function: str, sizes: Sequence[int], scale: float, tensors: Sequence[Tensor | None], size: int
    ) -> int | None:
        """Run a C function with scratch of ``size`` numbers for each thread; the first tensor is q."""
        q = tensors[0]
        assert q is not None
        threads = threads_for(q)
        scratch = q.new_empty(threads, size)
        run = getattr(_library(self, q.dtype), f"{self.name}_{function}")
        found: int | None = run(*sizes, scale, *map(address, (*tensors, scratch)), size, threads)
        return found


@cache
def _library(op: ChunkedOp, dtype: torch.dtype) -> CDLL:
    library = load(op.source, ("SPIKELM_DOUBLE",) if dtype == torch.float64 else ())
    scratch = getattr(library, f"{op.name}_scratch")
    scratch.argtypes = [*[c_int64] * (op.sizes - 2), c_int]
    scratch.restype = c_int64
    # Forward: inputs, state, two masks, output, last state, states, scratch. Backward: inputs, two masks,
    # states, both incoming gradients, a gradient for each input and for the state, scratch.
    for function, tensors, gives in (
        ("forward", op.inputs + 7, c_int),
        ("backward", 2 * op.inputs + 7, None),
    ):
        called = getattr(library, f"{op.name}_{function}")
        called.argtypes = [*[c_int64] * op.sizes, c_double, *[c_void_p] * tensors, c_int64, c_int]
        called.restype = gives
    return library


@cache
def _scratch_size(op: ChunkedOp, dtype: torch.dtype, sizes: tuple[int, ...], backward: bool) -> int:
    return int(getattr(_library(op, dtype), f"{op.name}_scratch")(*sizes, int(backward)))
