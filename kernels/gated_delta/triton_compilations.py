"""What the kernels of the gated delta rule ship: every launch of its calls, as triton_tiles.py cuts them.

On a GPU ``gated_delta_in_tiles`` (triton.py) brings every call to one of these: bfloat16, or float32 with
both masks and one query head for each key head; K of 64, 128 or 256, V a multiple of 64. What is covered
without being listed is written in gla/triton_compilations.py.
"""

import torch

from spikelm.kernels.ahead import Compilation
from spikelm.kernels.gated_delta.triton import launch_backward, launch_forward
from spikelm.kernels.gated_delta.triton_decode import launch_decode
from spikelm.kernels.triton_launch import WIDTHS, Recorder, listed

GROUPS, SHARED, STEPS = 16, 4, 4096  # key heads, query heads of each where several, tokens


def compilations(target: str) -> list[Compilation]:
    """Every shipped configuration for a target."""
    return listed(_record, "gated_delta", target)


def _record(paper: Recorder) -> None:
    for key_dim in reversed(WIDTHS):
        record_call(paper, torch.bfloat16, key_dim, WIDTHS[-1], 1)
        record_call(paper, torch.bfloat16, key_dim, WIDTHS[-1], SHARED)
        record_call(paper, torch.float32, key_dim, WIDTHS[-1], 1)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        record_decode(paper, dtype, 128)


def record_call(
    paper: Recorder,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    heads: int,
    masked: bool = True,
) -> None:
    """Launch forward and backward on paper, with this many query heads for each of the key heads."""
    tokens = torch.empty(1, STEPS, GROUPS, device="meta")
    q = tokens.new_empty(1, STEPS, GROUPS * heads, key_dim, dtype=dtype)
    k = tokens.new_empty(1, STEPS, GROUPS, key_dim, dtype=dtype)
    v = tokens.new_empty(1, STEPS, GROUPS, value_dim, dtype=dtype)
    state = tokens.new_empty(1, GROUPS, key_dim, value_dim)
    masks = [tokens[..., 0].bool() if masked else None] * 2
    o, last = launch_forward(paper, q, k, v, tokens, tokens, state, 1.0, *masks)
    launch_backward(paper, o, last, q, k, v, tokens, tokens, state, 1.0, *masks)


def record_decode(paper: Recorder, dtype: torch.dtype, key_dim: int) -> None:
    """Launch a decode step on paper."""
    k = torch.empty(1, GROUPS, key_dim, dtype=dtype, device="meta")
    q = k.new_empty(1, GROUPS * SHARED, key_dim)
    tokens = k[..., 0].float()
    pool = k.new_empty(1, GROUPS, key_dim, key_dim, dtype=torch.float32)
    launch_decode(paper, q, k, k, tokens, tokens, pool, k.new_empty(1, dtype=torch.int64), 1.0)
