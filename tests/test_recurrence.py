"""Helpers that parts with a memory of positions share, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikelm.recurrence import Context, Part, compacted, positions, scan
from spikelm.state import State

B, T, D = 4, 11, 3


def masks(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(B, T, generator=generator) < 0.25,
        torch.rand(B, T, generator=generator) < 0.6,
    )


def contexts() -> list[Context]:
    found = []
    for seed in range(5):
        reset, valid = masks(seed)
        valid[0] = seed % 2 == 0  # a row of nothing but padding, or none
        found += [Context(reset=reset, valid=valid), Context(reset=reset), Context(valid=valid), Context()]
    return found


@pytest.mark.parametrize("ctx", contexts())
def test_positions_count_valid_tokens_since_the_reset(ctx: Context) -> None:
    last = torch.tensor([0, 5, 17, 1_000_000])
    found, end = positions(last, ctx, T)
    for row in range(B):
        seen = int(last[row])
        for t in range(T):
            if ctx.reset is not None and ctx.reset[row, t]:
                seen = 0
            assert int(found[row, t]) == seen
            seen += 1 if ctx.valid is None else int(ctx.valid[row, t])
        assert int(end[row]) == seen


class PreviousTwo(Part):
    """The sum of a token and twice the one before, as a part with a step and as a compacted sequence."""

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        return {"last": torch.full((batch, D), 0.5, dtype=dtype)}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        last = state["last"]
        assert isinstance(last, Tensor)
        return x + 2 * last, {"last": x}

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        def run(x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
            if ctx.valid is not None:
                lengths = ctx.valid.sum(1, keepdim=True)
                assert torch.equal(ctx.valid, torch.arange(T) < lengths), "padding on the right only"
            return scan(self, x, state, ctx)

        return compacted(run, x, state, ctx, lambda: self.init_state(B, dtype=x.dtype))


@pytest.mark.parametrize("ctx", contexts())
def test_compacted_sequence_is_the_scan(ctx: Context) -> None:
    part = PreviousTwo()
    x = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    state: State = {"last": torch.randn(B, D, dtype=torch.float64)}
    fast, end = part.sequence(x, state, ctx)
    slow, last = scan(part, x, state, ctx)
    assert torch.equal(fast, slow)
    assert torch.equal(end["last"], last["last"])  # type: ignore[arg-type]
