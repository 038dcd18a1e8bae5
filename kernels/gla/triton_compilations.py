"""What the GLA kernels ship: every launch of the op's calls, as triton_tiles.py cuts them.

On a GPU :func:`spikelm.kernels.gla.triton.gla_in_tiles` brings every call to one of these: bfloat16 or float32, K
of 64, 128 or 256, V a multiple of 64, gates per head or per channel in float32, both masks or (bfloat16, one
query head for each key head) none. Not listed, because only addresses and turns of loops change:

- other V than 256, whose blocks are more or fewer programs; at 64 columns the gradients of q, k and g are
  stored in the inputs' dtype instead of float32;
- K where the tiles are those of a wider one;
- more query heads for a key head than four, and other numbers of key heads;
- slots of int32, and decode steps of narrower states than their block.

``tests/kernels/triton/test_ahead.py`` compiles a sample of those (marked slow).
"""

import itertools

import torch

from spikelm.kernels.ahead import Compilation
from spikelm.kernels.gla.triton import launch_backward, launch_forward
from spikelm.kernels.gla.triton_decode import launch_decode
from spikelm.kernels.gla.triton_tiles import CHANNEL, HEAD, NONE
from spikelm.kernels.triton_launch import WIDTHS, Recorder, listed

DTYPES = (torch.bfloat16, torch.float32)
GROUPS, SHARED, STEPS = 16, 4, 4096  # key heads, query heads of each where several, tokens


def compilations(target: str) -> list[Compilation]:
    """Every shipped configuration for a target."""
    return listed(_record, "gla", target)


def _record(paper: Recorder) -> None:
    for dtype, key_dim, gate in itertools.product(DTYPES, reversed(WIDTHS), (HEAD, CHANNEL)):
        for heads in (1, SHARED):
            record_call(paper, dtype, key_dim, WIDTHS[-1], gate, heads, True)
        if dtype == torch.bfloat16:
            record_call(paper, dtype, key_dim, WIDTHS[-1], gate, 1, False)
    for dtype, key_dim, gate in itertools.product((*DTYPES, torch.float16), WIDTHS, (NONE, HEAD, CHANNEL)):
        record_decode(paper, dtype, key_dim, gate, torch.int64)


def record_call(
    paper: Recorder,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    gate: int,
    heads: int,
    masked: bool,
) -> None:
    """Launch forward and backward on paper, with this many query heads for each of the key heads."""
    tokens = torch.empty(1, STEPS, GROUPS, device="meta")
    q = tokens.new_empty(1, STEPS, GROUPS * heads, key_dim, dtype=dtype)
    k = tokens.new_empty(1, STEPS, GROUPS, key_dim, dtype=dtype)
    v = tokens.new_empty(1, STEPS, GROUPS, value_dim, dtype=dtype)
    g = {NONE: None, HEAD: tokens[..., None], CHANNEL: k.float()}[gate]
    state = tokens.new_empty(1, GROUPS, key_dim, value_dim)
    masks = [tokens[..., 0].bool() if masked else None] * 2
    o, last = launch_forward(paper, q, k, v, g, state, 1.0, *masks)
    launch_backward(paper, o, last, q, k, v, g, state, 1.0, *masks)


def record_decode(paper: Recorder, dtype: torch.dtype, key_dim: int, gate: int, slots: torch.dtype) -> None:
    """Launch a decode step on paper."""
    k = torch.empty(1, GROUPS, key_dim, dtype=dtype, device="meta")
    q = k.new_empty(1, GROUPS * SHARED, key_dim)
    g = {NONE: None, HEAD: k[..., :1].float(), CHANNEL: k.float()}[gate]
    pool = k.new_empty(1, GROUPS, key_dim, key_dim, dtype=torch.float32)
    launch_decode(paper, q, k, k, g, pool, k.new_empty(1, dtype=slots), 1.0)
