"""What a mixture of experts counts and costs, and what stays equal to the bit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from spikelm.channels.experts import active_parameters, routed_shares
from spikelm.channels.moe import MoE
from spikelm.config import ModelConfig
from spikelm.inspection import inspect_config
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context
from spikelm.train.experts import shares
from spikelm.train.throughput import model_flops

from .mixtures import ADAPTIVE, NONE, D, config, inputs, model


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
