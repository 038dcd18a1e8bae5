"""Mixtures of experts against a loop over tokens, and what they report."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from spikelm.channels.experts import active_parameters, routed_shares
from spikelm.channels.moe import MoE
from spikelm.channels.routing import balance_loss, route, z_loss
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.inspection import inspect_config
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context
from spikelm.train.experts import shares
from spikelm.train.throughput import model_flops

D = 8
NONE = {"name": "none"}
ADAPTIVE = {"name": "adaptive", "dead_zone": 0.5}


def config(neuron: dict[str, Any] = NONE, layers: int = 1, **options: Any) -> ModelConfig:
    given = {"experts": 5, "top_k": 2, "hidden": 6, **options}
    return ModelConfig(
        vocab_size=11,
        hidden_size=D,
        num_hidden_layers=layers,
        layers=({"mixer": {"name": "wkv4"}, "channel": {"name": "moe", **given}},),
        neuron=neuron,
    )


def model(neuron: dict[str, Any] = NONE, layers: int = 1, **options: Any) -> SpikeLM:
    torch.manual_seed(3)
    return SpikeLM(config(neuron, layers, **options)).double()


def part(neuron: dict[str, Any] = NONE, **options: Any) -> MoE:
    return cast(MoE, model(neuron, **options).blocks[0].channel)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


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


def test_meter_counts_the_tokens_of_each_expert() -> None:
    built = model(ADAPTIVE, layers=2, shared=1)
    tokens = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    meter, loads = Meter(), cast("dict[str, Tensor]", {})
    built(tokens, None, Context(meter=meter, loads=loads))
    summary = meter.summary()
    dense = active = 0.0
    for path, entry in summary["projections"].items():
        size = entry["in_features"] * entry["out_features"]
        dense += size
        active += size * (2 / 5 if ".experts." in path else 1)
    for layer in range(2):
        path = f"blocks.{layer}.channel"
        for index, load in enumerate(loads[path].tolist()):
            for name in ("gate", "up", "down"):
                entry = summary["projections"][f"{path}.experts.{index}.{name}"]
                assert entry["tokens"] == load and entry["spiking"]
        assert summary["projections"][f"{path}.router"]["tokens"] == 24
        assert summary["projections"][f"{path}.shared.0.up"]["tokens"] == 24
    # Each token passed through 2 of 5 experts, however they were shared out.
    assert summary["total"]["dense_macs"] == pytest.approx(active)
    assert active < dense
    # Integer counts reach the weights.
    expert = cast(MoE, built.blocks[0].channel).experts[0]
    seen: list[Tensor] = []
    expert.up.linear.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    built(tokens)
    assert torch.equal(seen[0], seen[0].round()) and seen[0].abs().max() > 1


def test_totals_are_weighted_by_tokens() -> None:
    """An expert that saw one token must not count like one that saw a thousand."""
    meter = Meter()
    common: dict[str, Any] = {"spiking": True, "out_features": 2, "valid": None, "cap": None}
    meter.record("all", torch.ones(8, 4), **common)
    meter.record("rare", torch.zeros(2, 4), **common)
    meter.record("never", torch.zeros(0, 4), **common)
    total = meter.summary()["total"]
    assert total["dense_macs"] == 8 + 8 / 4
    assert total["firing_rate"] == pytest.approx(0.8) and total["mean_count"] == pytest.approx(0.8)


def test_active_parameters_and_flops() -> None:
    built, seen = model(layers=2, shared=1), inspect_config(config(layers=2, shared=1))
    idle = 2 * 3 * (3 * D * 6)  # two layers, three of five experts, three matrices
    assert seen.parameters == built.num_parameters()
    assert seen.active_parameters == active_parameters(built) == built.num_parameters() - idle
    linears = sum(m.weight.numel() for m in built.modules() if isinstance(m, torch.nn.Linear))
    assert model_flops(built) == 6 * (linears - idle)
    assert not routed_shares(SpikeLM(ModelConfig(vocab_size=11, hidden_size=D, num_hidden_layers=1)))


def test_shares() -> None:
    found = shares({"a": [1, 3, 0, 0], "b": [2, 2], "c": [7]})
    assert found["a"]["max_share"] == 0.75 and found["a"]["min_share"] == 0.0
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(4)
    assert found["a"]["entropy"] == pytest.approx(entropy, abs=1e-6)
    assert found["b"]["entropy"] == 1.0 and found["c"]["shares"] == [1.0]


def test_recomputation_counts_once() -> None:
    tokens = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    told: list[Any] = []
    for recompute in (False, True):
        built = model(ADAPTIVE, layers=2, z_loss=0.1).train()
        built.gradient_checkpointing = recompute
        loads: dict[str, Tensor] = {}
        ctx = Context(losses=[], loads=loads)
        logits, _ = built(tokens, None, ctx)
        assert ctx.losses is not None and len(ctx.losses) == 4
        (logits.square().mean() + torch.stack(ctx.losses).sum()).backward()
        told.append((loads, [p.grad for p in built.parameters()]))
    (once, left), (twice, right) = told
    assert {k: v.tolist() for k, v in once.items()} == {k: v.tolist() for k, v in twice.items()}
    assert all(int(load.sum()) == 2 * 12 for load in once.values())
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_int8_is_equal_to_the_bit_in_any_batch(router: str) -> None:
    """Exact products: neither the choice nor the result depends on what else is there."""
    from spikelm.weights import Int8Linear

    torch.manual_seed(0)
    int8 = dataclasses.replace(
        config(ADAPTIVE, router=router, shared=1, experts=6, hidden=24), weights={"name": "int8"}
    )
    moe = cast(MoE, SpikeLM(int8).blocks[0].channel).eval()
    for module in moe.modules():
        if isinstance(module, Int8Linear):
            module.load_float(torch.randn(module.out_features, module.in_features))
    x = inputs(5, 9).float()
    with torch.no_grad():
        whole, _ = moe(x)
        for row in range(5):
            assert torch.equal(moe(x[row : row + 1])[0][0], whole[row])
        for t in range(9):
            assert torch.equal(moe(x[:, t])[0], whole[:, t])
    assert whole.abs().mean() > 0


def test_random_numbers_follow_the_token() -> None:
    """A neuron that draws must draw the same for a token, whatever the batch and the routing."""
    from spikelm.channels.moe import _per_token

    random = CounterRandom(seed=1, stream=torch.tensor([7, 9]), position=torch.arange(6).view(2, 3))
    whole = random.uniform("x", 4)
    rows = torch.tensor([1, 5])
    ctx = _per_token(inputs(2, 3), rows, Context(random=random))
    assert ctx.random is not None
    assert torch.equal(ctx.random.uniform("x", 4)[:, 0], whole.flatten(0, 1)[rows])
    step = _per_token(inputs(2), None, Context(random=random.at(1)))
    assert step.random is not None and torch.equal(step.random.uniform("x", 4), whole[:, 1])


@pytest.mark.parametrize("neuron", [NONE, ADAPTIVE], ids=lambda spec: spec["name"])
def test_the_bias_balances_a_training(neuron: dict[str, Any]) -> None:
    """A router that prefers two of its experts leaves others idle; with the bias all of them get tokens."""
    each: dict[float, Tensor] = {}
    for rate in (0.0, 0.02):
        torch.manual_seed(0)
        options: dict[str, Any] = {"experts": 8, "router": "sigmoid", "balance_loss": 0.0}
        built = SpikeLM(config(neuron, **options, loss_free_bias=rate)).train()
        moe = cast(MoE, built.blocks[0].channel)
        with torch.no_grad():
            moe.router.linear.weight[:2] *= 5.0
        optimizer = torch.optim.Adam(built.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros(8)
        for step in range(60):
            tokens = torch.randint(0, 11, (8, 16), generator=generator)
            loads: dict[str, Tensor] = {}
            logits, _ = built(tokens, None, Context(losses=[], loads=loads))
            # The next token is a function of this one: there is something to learn.
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ((3 * tokens + 1) % 11).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moe.balance(loads["blocks.0.channel"])
            if step >= 40:
                total += loads["blocks.0.channel"]
        each[rate] = total / total.sum()
        assert loss.item() < 1.0
    assert each[0.0].min() < 0.05 and each[0.0].max() > 0.18, each
    assert each[0.02].min() > 0.08 and each[0.02].max() < 0.17, each  # 0.125 would be even
