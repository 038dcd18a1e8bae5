"""The contract of a part, for every registered one (DESIGN: what "equal" means)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm import state as states
from spikelm.block import Block
from spikelm.recurrence import Context, Part, scan
from spikelm.state import State

from .parts import D, cases, randomise

B, T = 3, 13
CASES = dict(cases())
Make = Callable[[], Part]


LONGEST = 64
"""Room that growing memory gets."""


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def part(request: pytest.FixtureRequest) -> Part:
    """Any part; those that are not causal have a test without this fixture's scans (see ``causal``)."""
    made: Part = request.param().double()
    randomise(made)
    return made


@pytest.fixture
def causal(part: Part) -> Part:
    """A part with a step."""
    if not is_causal(part):
        pytest.skip("not causal: it has no step and no state")
    return part


def is_causal(part: Part) -> bool:
    return all(module.causal for module in part.modules() if isinstance(module, Part))


def start(part: Part, rows: int = B, dtype: torch.dtype = torch.float64) -> State:
    """The state before any token."""
    return part.init_state(rows, dtype=dtype, max_len=LONGEST)


def inputs(T: int = T, seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def a_state(part: Part) -> State:
    """A state in the middle of a text."""
    if not is_causal(part):
        return start(part)
    _, state = scan(part, inputs(4, seed=9), start(part), Context())
    return states.detach(state)


def masks(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reset = torch.rand(B, T, generator=generator) < 0.25
    valid = torch.rand(B, T, generator=generator) < 0.7
    return reset, valid


def output_of(y: Tensor, ctx: Context) -> Tensor:
    """Outputs to compare; a block passes its residual stream through where a token is invalid."""
    return y if ctx.valid is None else y * ctx.valid[..., None]


def gradients(part: Part, run: Callable[..., tuple[Tensor, State]], x: Tensor, ctx: Context) -> Any:
    """Outputs, state and the gradient of everything, for x between a prefix and a suffix.

    Both ends are scanned, so the state's gradients, incoming and outgoing, are compared through the tokens
    before and after: a state may hold redundant numbers (wkv4: a common exponent) whose own gradient has
    no meaning.
    """
    before, after = inputs(4, seed=9).requires_grad_(), inputs(3, seed=8).requires_grad_()
    x = x.clone().requires_grad_()
    _, middle = scan(part, before, start(part), Context())
    y, end = run(x, middle, ctx)
    y = output_of(y, ctx)
    probe, _ = scan(part, after, end, Context())
    loss = weighted(y, 1.0) + weighted(probe, 2.0)
    wanted = {"x": x, "before": before, "after": after, **dict(part.named_parameters())}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return y, end, {name: torch.zeros_like(v) if g is None else g for (name, v), g in pairs}


def weighted(y: Tensor, scale: float) -> Tensor:
    """A sum in which every element counts differently."""
    return (y * torch.linspace(-1, scale, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def same(a: Tensor, b: Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def same_state(a: State, b: State) -> None:
    left, right = states.flatten(a), states.flatten(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        same(value, right[name], f"state {name}")


@pytest.mark.parametrize("masked", ["plain", "reset", "valid", "both"])
@pytest.mark.parametrize("length", [1, T])
def test_sequence_is_scan_of_step(causal: Part, masked: str, length: int) -> None:
    reset, valid = (mask[:, :length] for mask in masks())
    ctx = Context(
        reset=reset if masked in ("reset", "both") else None,
        valid=valid if masked in ("valid", "both") else None,
    )
    part, x = causal, inputs(length)
    fast = gradients(part, lambda x, s, c: part(x, s, c), x, ctx)
    slow = gradients(part, lambda x, s, c: scan(part, x, s, c), x, ctx)
    same(fast[0], slow[0], "output")
    same_state(fast[1], slow[1])
    for name, gradient in slow[2].items():
        same(fast[2][name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("cut", [1, 5, T - 1])
def test_split_anywhere_is_whole(causal: Part, cut: int) -> None:
    part, x, state = causal, inputs(), a_state(causal)
    whole, end = part(x, state)
    first, middle = part(x[:, :cut], state)
    second, last = part(x[:, cut:], middle)
    same(whole, torch.cat([first, second], 1))
    same_state(end, last)


def test_reset_is_separate_sequences(part: Part) -> None:
    x, cut = inputs(), 6
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, cut] = True
    packed, end = part(x, a_state(part), Context(reset=reset))
    alone, last = part(x[:, cut:], start(part))
    same(packed[:, cut:], alone)
    same_state(end, last)
    if not is_causal(part):  # neither does the first document see the second
        same(packed[:, :cut], part(x[:, :cut], start(part))[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_none(part: Part, side: str) -> None:
    x, state, pad = inputs(), a_state(part), 4
    plain, end = part(x, state)
    filler = inputs(pad, seed=3)
    padded = torch.cat([filler, x] if side == "left" else [x, filler], 1)
    valid = torch.ones(B, T + pad, dtype=torch.bool)
    real = slice(pad, None) if side == "left" else slice(0, T)
    valid[:, :pad] = side != "left"
    valid[:, T:] = side == "left" if side == "right" else True
    y, last = part(padded, state, Context(valid=valid))
    same(y[:, real], plain)
    same_state(end, last)
    if not isinstance(part, Block):
        assert not y[~valid].any()


def test_rows_are_independent(part: Part) -> None:
    x, state = inputs(), a_state(part)
    whole, end = part(x, state)
    order = torch.tensor([2, 0])
    some, last = part(x[order], states.select_rows(state, order))
    same(whole[order], some)
    same_state(states.select_rows(end, order), last)


def test_state_is_everything_and_stays_small(part: Part) -> None:
    x, state = inputs(), a_state(part)
    first, end = part(x, state)
    again, _ = part(x, state)
    assert torch.equal(first, again), "a call left something behind outside the state"
    fresh = start(part)
    assert {k: v.shape for k, v in states.flatten(end).items()} == {
        k: v.shape for k, v in states.flatten(fresh).items()
    }
    assert all(value.shape[0] == B for value in states.flatten(fresh).values())


def test_float32_agrees_where_no_neuron_is_on_the_edge(causal: Part) -> None:
    """DESIGN: in fp32 a spike on the edge may flip; the share of outputs that differ is under 0.1%."""
    part = causal.float()
    x = torch.randn(32, 24, D, generator=torch.Generator().manual_seed(2))
    fast, _ = part(x)
    slow, _ = scan(part, x, start(part, 32, torch.float32), Context())
    differs = (fast - slow).abs() > 1e-4 * (1 + slow.abs())
    assert fast.dtype == torch.float32
    assert differs.float().mean() < 1e-3


def test_growing_memory_says_how_far_it_reaches_and_can_be_extended(causal: Part) -> None:
    part, x = causal, inputs()
    state = a_state(part)
    grows = any(module.grows for module in part.modules() if isinstance(module, Part))
    assert part.capacity(state) == (LONGEST if grows else None)
    wider = part.reserve(state, LONGEST + 16)
    assert part.capacity(wider) == (LONGEST + 16 if grows else None)
    same(part(x, state)[0], part(x, wider)[0])
