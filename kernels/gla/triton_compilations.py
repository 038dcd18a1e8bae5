"""What the GLA kernels ship: every launch of the op's calls, as triton_tiles.py cuts them.

On a GPU ``gla_in_tiles`` (triton.py) brings every call to one of these: bfloat16, or float32 with both masks;
K of 64, 128 or 256; V a multiple of 64; gates per head or per channel in float32; several query heads for a
key head in bfloat16 with gates per channel alone. ``tests/kernels/triton/test_listed.py`` shows that no call
launches anything else. All are listed with both masks and V = 256. Others are covered, as only less is done,
or addresses and turns of loops change:

- bfloat16 without masks, or with one of the two, leaves loads and selections out;
- other V has more or fewer blocks, hence programs; at 64 columns the gradients of q, k and g are stored in
  the inputs' dtype instead of float32;
- K where the tiles are those of a wider one;
- more query heads for a key head than four, and other numbers of key heads;
- slots of int32, and decode steps of other widths, whose programs hold 4096 numbers of state all the same.

``tests/kernels/triton/test_ahead.py`` compiles a sample of those (marked slow).
"""

import itertools

import torch

from spikelm.kernels.ahead import Compilation
from spikelm.kernels.gla.triton import launch_backward, launch_forward
from spikelm.kernels.gla.triton_decode import launch_decode
from spikelm.kernels.gla.triton_tiles import CHANNEL, HEAD, NONE
from spikelm.kernels.triton_launch import WIDTHS, Recorder, listed

GROUPS, SHARED, STEPS = 16, 4, 4096  # key heads, query heads of each where several, tokens


def compilations(target: str) -> list[Compilation]:
    """Every shipped configuration for a target."""
    return listed(_record, "gla", target)


def _record(paper: Recorder) -> None:
    for key_dim, gate in itertools.product(reversed(WIDTHS), (HEAD, CHANNEL)):
        record_call(paper, torch.bfloat16, key_dim, WIDTHS[-1], gate, 1)
        record_call(paper, torch.float32, key_dim, WIDTHS[-1], gate, 1)
        if gate == CHANNEL:
            record_call(paper, torch.bfloat16, key_dim, WIDTHS[-1], gate, SHARED)
    for dtype, gate in itertools.product(
        (torch.bfloat16, torch.float32, torch.float16), (NONE, HEAD, CHANNEL)
    ):
        record_decode(paper, dtype, 128, gate)


def record_call(
    paper: Recorder,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    gate: int,
    heads: int,
    masked: bool = True,
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


def record_decode(paper: Recorder, dtype: torch.dtype, key_dim: int, gate: int) -> None:
    """Launch a decode step on paper."""
    k = torch.empty(1, GROUPS, key_dim, dtype=dtype, device="meta")
    q = k.new_empty(1, GROUPS * SHARED, key_dim)
    g = {NONE: None, HEAD: k[..., :1].float(), CHANNEL: k.float()}[gate]
    pool = k.new_empty(1, GROUPS, key_dim, key_dim, dtype=torch.float32)
    launch_decode(paper, q, k, k, g, pool, k.new_empty(1, dtype=torch.int64), 1.0)
