"""Mixtures of experts against a loop over tokens, and what they report."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from spikelm.channels.moe import MoE
from spikelm.channels.routing import balance_loss, route, z_loss
from spikelm.errors import ConfigError
from spikelm.model import SpikeLM
from spikelm.recurrence import Context

from .mixtures import ADAPTIVE, D, config, inputs, model, part


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def expert_on(weights: dict[str, list[list[float]]], x: list[float]) -> list[float]:
    """SwiGLU with Python's numbers."""

    def times(matrix: list[list[float]], vector: list[float]) -> list[float]:
        return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in matrix]

    gate, up = times(weights["gate"], x), times(weights["up"], x)
    return times(weights["down"], [silu(a) * b for a, b in zip(gate, up, strict=True)])


def straight(moe: MoE, x: Tensor) -> Tensor:
    """One token after the other, one expert after the other, in Python's numbers."""

    def of(module: Any) -> dict[str, list[list[float]]]:
        return {name: getattr(module, name).linear.weight.tolist() for name in ("gate", "up", "down")}

    experts, shared = [of(m) for m in moe.experts], [of(m) for m in moe.shared]
    router = moe.router.linear.weight.tolist()
    bias = [0.0] * len(experts) if moe.expert_bias is None else moe.expert_bias.tolist()
    rows = []
    for token in x.reshape(-1, D).tolist():
        logits = [sum(w * v for w, v in zip(row, token, strict=True)) for row in router]
        if moe.kind == "softmax":
            total = sum(math.exp(v) for v in logits)
            scores = [math.exp(v) / total for v in logits]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in logits]
        ranked = sorted(range(len(scores)), key=lambda i: (-(scores[i] + bias[i]), i))[: moe.top_k]
        weights = [scores[i] for i in ranked]
        if moe.normalise:
            weights = [w / sum(weights) for w in weights]
        y = [0.0] * D
        for i, w in zip(ranked, weights, strict=True):
            y = [a + moe.scale * w * b for a, b in zip(y, expert_on(experts[i], token), strict=True)]
        for one in shared:
            y = [a + b for a, b in zip(y, expert_on(one, token), strict=True)]
        rows.append(y)
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"top_k": 1, "normalise_weights": False},
    {"top_k": 5},
    {"router": "sigmoid", "scale": 2.5, "shared": 2, "shared_hidden": 4, "loss_free_bias": 0.1},
    {"router": "softmax", "loss_free_bias": 0.1, "normalise_weights": False, "shared": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_loop_over_tokens_gives_the_same(options: dict[str, Any]) -> None:
    moe = part(**options)
    if moe.expert_bias is not None:
        moe.expert_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4]))
    x = inputs(3, 7)
    torch.testing.assert_close(moe(x)[0], straight(moe, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moe(x[:, 0])[0], straight(moe, x[:, 0]), rtol=1e-10, atol=1e-10)


def test_gradients() -> None:
    moe = part(router="sigmoid", shared=1, experts=3, hidden=2, balance_loss=0.1, z_loss=0.1)
    x = inputs(1, 3).requires_grad_()

    def run(x: Tensor, *_: Tensor) -> Tensor:
        ctx = Context(losses=[])
        y, _ = moe(x, None, ctx)
        assert ctx.losses is not None and len(ctx.losses) == 2
        return torch.cat([y.flatten(), torch.stack(ctx.losses)])

    assert torch.autograd.gradcheck(run, (x, *moe.parameters()))


def test_an_expert_without_a_token_has_a_gradient_of_zero() -> None:
    """ZeRO-3 and DistributedDataParallel wait for every parameter."""
    moe = part(ADAPTIVE, experts=16)
    assert moe.expert_bias is None
    y, _ = moe(inputs(1, 1))
    y.sum().backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    assert all(value is not None for value in gradients.values())
    touched = {name.split(".")[1] for name, g in gradients.items() if "experts" in name and g.any()}
    assert len(touched) == 2


def test_nothing_is_routed_when_nothing_is_valid() -> None:
    moe = part(ADAPTIVE, shared=1)
    loads: dict[str, Tensor] = {}
    ctx = Context(valid=torch.zeros(2, 3, dtype=torch.bool), losses=[], loads=loads)
    x = inputs(2, 3).requires_grad_()
    y, _ = moe(x, None, ctx)
    assert not y.any() and ctx.losses is not None
    assert [float(loss.detach()) for loss in ctx.losses] == [0.0]
    assert loads[moe.path].tolist() == [0] * 5
    (y.sum() + ctx.losses[0]).backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


def test_padding_is_in_no_load_and_no_loss() -> None:
    moe = part(z_loss=0.1)
    x, valid = inputs(2, 6), torch.rand(2, 6, generator=torch.Generator().manual_seed(2)) < 0.6
    told: list[tuple[list[float], list[int]]] = []
    for masked in (True, False):
        loads: dict[str, Tensor] = {}
        given = x if masked else x[valid][None]
        ctx = Context(valid=valid if masked else None, losses=[], loads=loads)
        moe(given, None, ctx)
        assert ctx.losses is not None
        told.append(([float(loss.detach()) for loss in ctx.losses], loads[moe.path].tolist()))
    assert told[0][1] == told[1][1] and sum(told[0][1]) == 2 * int(valid.sum())
    assert told[0][0] == pytest.approx(told[1][0], rel=1e-12)


def test_balance_loss_is_the_formula() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0], [0.5, 0.0, -1.0]]).double()
    routing = route(logits, None, router="softmax", top_k=2, normalise=True, scale=1.0)
    assert routing.experts.tolist() == [[0, 2], [1, 2], [2, 0], [0, 1]]
    assert routing.load.tolist() == [3, 2, 3]
    mean = logits.softmax(-1).mean(0).tolist()
    expected = 3 * sum(f * p for f, p in zip([3 / 8, 2 / 8, 3 / 8], mean, strict=True))
    assert float(balance_loss(routing)) == pytest.approx(expected, rel=1e-12)
    assert float(z_loss(logits)) == pytest.approx(
        sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()) / 4, rel=1e-12
    )
    even = route(torch.zeros(4, 2).double(), None, router="softmax", top_k=2, normalise=True, scale=1.0)
    assert float(balance_loss(even)) == pytest.approx(1.0)
    all_to_one = torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 6).double()
    worst = route(all_to_one, None, router="softmax", top_k=1, normalise=True, scale=1.0)
    assert float(balance_loss(worst)) == pytest.approx(4.0)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_bias_changes_the_choice_and_not_the_weights(router: str) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).double()
    options: dict[str, Any] = {"router": router, "top_k": 2, "normalise": False, "scale": 1.0}
    before = route(logits, None, **options)
    after = route(logits, torch.tensor([0.0, -5.0, 5.0]), **options)
    assert before.experts.tolist() == [[0, 1]] and after.experts.tolist() == [[2, 0]]
    score = logits.softmax(-1)[0] if router == "softmax" else logits.sigmoid()[0]
    torch.testing.assert_close(after.weights[0], score[[2, 0]])
    torch.testing.assert_close(after.probabilities, before.probabilities)


def test_equal_scores_go_to_the_first_experts() -> None:
    chosen = route(torch.zeros(7, 40), None, router="softmax", top_k=3, normalise=True, scale=1.0).experts
    assert chosen.tolist() == [[0, 1, 2]] * 7


def test_the_update_of_the_bias() -> None:
    moe = part(loss_free_bias=0.25)
    assert moe.expert_bias is not None
    moe.balance(torch.tensor([10, 0, 4, 5, 1]))  # 4 each would be even
    assert moe.expert_bias.tolist() == [-0.25, 0.25, 0.0, -0.25, 0.25]
    still, none = part(loss_free_bias=0.0), part()
    still.balance(torch.tensor([10, 0, 4, 5, 1]))
    none.balance(torch.tensor([10, 0, 4, 5, 1]))
    assert still.expert_bias is not None and not still.expert_bias.any() and none.expert_bias is None
    assert "expert_bias" in still.state_dict() and "expert_bias" not in none.state_dict()


@pytest.mark.parametrize("neuron", [{"name": "lif"}, {"name": "plif"}, {"name": "if"}])
def test_an_expert_with_memory_is_refused(neuron: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"experts\.0\.gate .* remembers .*neuron_overrides"):
        model(neuron)


def test_router_and_shared_experts_may_remember() -> None:
    mixed = dataclasses.replace(
        config({"name": "lif"}, shared=1), neuron_overrides={"*.experts.*": {"name": "adaptive"}}
    )
    moe = cast(MoE, SpikeLM(mixed).double().blocks[0].channel)
    x = inputs(2, 5)
    whole, end = moe(x)
    first, middle = moe(x[:, :3])
    second, last = moe(x[:, 3:], middle)
    torch.testing.assert_close(whole, torch.cat([first, second], 1), rtol=1e-12, atol=1e-12)
    assert {"router", "shared"} == set(end) and set(end["shared"]) == {"0"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 6}, "top_k is 6; expected 1 to 5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"experts": 0}, "experts is 0"),
        ({"router": "softmx"}, "softmax"),
        ({"balance_loss": -0.1}, "balance_loss is -0.1"),
        ({"shared": -1}, "shared is -1"),
        ({"loss_free_bias": -1e-3}, "loss_free_bias"),
        ({"hidden": 0}, "hidden is 0"),
        ({"shared_hidden": 0, "shared": 1}, "shared_hidden is 0"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        model(**options)


def test_the_router_is_fp32_in_a_bfloat16_model() -> None:
    torch.manual_seed(0)
    low = SpikeLM(config(ADAPTIVE, loss_free_bias=1e-3)).to(torch.bfloat16)
    kept = low.fp32_parameters()
    assert {"blocks.0.channel.router.linear.weight", "blocks.0.channel.expert_bias"} <= kept
    moe = cast(MoE, low.blocks[0].channel)
    moe.router.float()
    seen: list[Tensor] = []
    moe.router.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    x = inputs(1, 4).to(torch.bfloat16)
    y, _ = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moe(x)
    assert y.dtype == torch.bfloat16
    assert [logits.dtype for logits in seen] == [torch.float32] * 2 and torch.equal(seen[0], seen[1])
