"""torch.compile takes a block of every registered part whole: one graph, the same values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.block import Block
from spikelm.config import ModelConfig
from spikelm.recurrence import Context
from spikelm.registry import channels, mixers, neurons
from spikelm.state import State, flatten

B, T, D = 2, 6, 16
# What a part needs beside its name; a new part is compiled with its defaults without a line here.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"num_heads": 2} for name in ("attention", "gated_delta", "gla", "gla_tied")},
    "swa": {"num_heads": 2, "window": 3},
    "parallel": {"branches": [{"name": "wkv4"}, {"name": "gla", "num_heads": 2}]},
    "moe": {"experts": 3, "hidden": 8},
}
MIXING = [*((name, "rwkv") for name in mixers.names()), *(("wkv4", name) for name in channels.names())]
MAIN = {("wkv4", "rwkv"), ("gla", "rwkv"), ("wkv4", "swiglu")}
Result = tuple[Tensor, State, list[Tensor]]


def make(mixer: str, channel: str, neuron: str = "adaptive") -> Callable[[Tensor, State, Tensor], Result]:
    """Training forward of one block; the block is the function's attribute ``block``."""
    layer = {
        "mixer": {"name": mixer, **OPTIONS.get(mixer, {})},
        "channel": {"name": channel, **OPTIONS.get(channel, {})},
    }
    config = ModelConfig(
        vocab_size=11, hidden_size=D, num_hidden_layers=1, layers=[layer], neuron={"name": neuron}
    )
    block = Block(config, 0)

    def forward(x: Tensor, state: State, reset: Tensor) -> Result:
        losses: list[Tensor] = []
        y, new = block(x, state, Context(reset=reset, losses=losses))
        return y, new, losses

    forward.block = block  # type: ignore[attr-defined]
    return forward


def inputs(block: Block) -> tuple[Tensor, State, Tensor]:
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = True
    return torch.randn(B, T, D, requires_grad=True), block.init_state(B, max_len=T), reset


def compile_whole(forward: Callable[..., Result], backend: str) -> Callable[..., Result]:
    torch._dynamo.reset()
    compiled: Callable[..., Result] = torch.compile(forward, fullgraph=True, backend=backend)
    return compiled


@pytest.mark.parametrize(("mixer", "channel"), MIXING)
def test_a_block_is_one_graph(mixer: str, channel: str) -> None:
    forward = make(mixer, channel)
    given = inputs(forward.block)  # type: ignore[attr-defined]
    compare(compile_whole(forward, "eager")(*given), forward(*given))


@pytest.mark.parametrize("neuron", neurons.names())
def test_with_every_neuron(neuron: str) -> None:
    forward = make("wkv4", "rwkv", neuron)
    given = inputs(forward.block)  # type: ignore[attr-defined]
    compare(compile_whole(forward, "eager")(*given), forward(*given))


@pytest.mark.parametrize(
    ("mixer", "channel"),
    [case if case in MAIN else pytest.param(*case, marks=pytest.mark.slow) for case in MIXING],
)
def test_forward_and_backward(mixer: str, channel: str) -> None:
    """Through AOTAutograd, which traces the backward pass too."""
    forward = make(mixer, channel)
    block: Block = forward.block  # type: ignore[attr-defined]
    given = inputs(block)
    found, expected = compile_whole(forward, "aot_eager")(*given), forward(*given)
    compare(found, expected)
    leaves = [given[0], *(p for p in block.parameters() if p.requires_grad)]
    weights = torch.randn_like(found[0])
    pairs = zip(*(_gradients(result, weights, leaves) for result in (found, expected)), strict=True)
    for i, (a, b) in enumerate(pairs):
        # A parameter that nothing reaches has no gradient, or zeros where one graph computes all of them.
        a, b = (torch.zeros_like(leaves[i]) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "options"), [("swa", {"window": 3}), ("attention", {}), ("swa", {"window": 300})]
)
def test_attention_goes_on_from_a_state(mixer: str, options: dict[str, Any]) -> None:
    """A compiled call may not look at positions: it reads the whole ring and masks what is not filled."""
    config = ModelConfig(
        vocab_size=11,
        hidden_size=D,
        num_hidden_layers=1,
        layers=[{"mixer": {"name": mixer, "num_heads": 2, **options}, "channel": {"name": "rwkv"}}],
        neuron={"name": "none"},
    )
    block = Block(config, 0)
    x, reset = torch.randn(B, 280, D), torch.rand(B, 280) < 0.05
    state = block.init_state(B, max_len=300)
    compiled = compile_whole(lambda x, state, reset: (*block(x, state, Context(reset=reset)), []), "eager")
    with torch.no_grad():
        whole, last = block(x, state, Context(reset=reset))
        pieces = []
        for start, stop in ((0, 9), (9, 280)):
            y, state, _ = compiled(x[:, start:stop], state, reset[:, start:stop])
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    for name, value in flatten(last).items():
        torch.testing.assert_close(flatten(state)[name], value, rtol=1e-4, atol=1e-5)


def compare(found: Result, expected: Result) -> None:
    torch.testing.assert_close(found[0], expected[0])
    for a, b in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(a, b)
    other = flatten(expected[1])
    for name, value in flatten(found[1]).items():
        torch.testing.assert_close(value, other[name])


def _gradients(result: Result, weights: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    y, _, losses = result
    total = (y * weights).sum() + sum(losses)
    return torch.autograd.grad(total, leaves, allow_unused=True)
