"""Grouped products of all experts against the experts one by one."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from spikelm.channels import experts as experts_module
from spikelm.channels.grouped import refusal, worthwhile
from spikelm.channels.moe import MoE
from spikelm.config import ModelConfig
from spikelm.kernels.dispatch import use_backend
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.recurrence import EMPTY, Context

CPU = torch.device("cpu")
NEURONS: list[dict[str, Any]] = [
    {"name": "none"},
    {"name": "adaptive", "dead_zone": 1.0},
    {"name": "heaviside"},
]


def made(neuron: dict[str, Any] | None = None, **values: Any) -> MoE:
    torch.manual_seed(0)
    channel = {"name": "moe", "experts": 6, "top_k": 2, "hidden": 16, "shared": 1}
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        layers=({"mixer": {"name": "wkv4"}, "channel": {**channel, **values.pop("channel", {})}},),
        neuron=neuron or {"name": "adaptive"},
        **values,
    )
    return cast(MoE, SpikeLM(config).blocks[0].channel)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every grouped call that is made."""
    seen: list[int] = []
    original = experts_module.grouped

    def counted(parts: Any, tokens: Tensor, rows: Tensor, load: Tensor, ctx: Context) -> Tensor:
        seen.append(len(rows))
        return original(parts, tokens, rows, load, ctx)

    monkeypatch.setattr(experts_module, "grouped", counted)
    return seen


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda spec: spec["name"])
@pytest.mark.parametrize("case", ["sequence", "masked", "step", "one token", "autocast"])
def test_the_same_as_one_by_one(neuron: dict[str, Any], case: str, calls: list[int]) -> None:
    moe = made(neuron)
    x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
    ctx = EMPTY
    if case == "masked":
        ctx = Context(valid=torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.5)
    x = {"step": x[:, 0], "one token": x[:1, :1]}.get(case, x)
    found = []
    for name in ("torch", "reference"):
        moe.zero_grad()
        given = x.clone().requires_grad_()
        with use_backend(name), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            y, _ = moe(given, None, ctx)
            y.float().square().sum().backward()
        gradients = {key: p.grad for key, p in moe.named_parameters()}
        assert all(g is not None for g in gradients.values())
        found.append([y, given.grad, *gradients.values()])
    assert len(calls) == 1, "one of the two was to be grouped"
    tolerance = 2e-2 if case == "autocast" else 1e-5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (b.abs().max().item() + 1e-3))


def test_gradients_of_a_plain_sum(calls: list[int]) -> None:
    """The gradient of a sum has no strides, which grouped_mm itself refuses."""
    moe = made({"name": "none"}, channel={"shared": 0})
    y, _ = moe(torch.randn(2, 4, 8))
    y.sum().backward()
    assert len(calls) == 1 and all(p.grad is not None for p in moe.parameters())


def test_what_cannot_be_grouped() -> None:
    def why(moe: MoE, ctx: Context = EMPTY) -> str | None:
        return refusal(list(moe.experts), CPU, ctx)

    assert why(made()) is None
    assert "meter" in str(why(made(), Context(meter=Meter())))
    assert "no multiple of 16 bytes" in str(why(made(channel={"hidden": 6})))
    assert "float64" in str(why(cast(MoE, made().double())))
    assert "rate_target" in str(why(made({"name": "adaptive", "rate_target": {"target": 0.2}})))
    assert "parameters" in str(why(made({"name": "heaviside", "gain": 1.0})))
    for path in ("*.experts.3.up", "*.experts.0.down"):
        mixed = made(neuron_overrides={path: {"name": "adaptive", "k": 2.0}})
        assert why(mixed) == "the neurons differ"
    assert "hook" in str(why(hooked(made())))
    assert "no plain projection" in str(why(made(weights={"name": "int8"})))
    wrapped = made()
    wrapped.experts[0].gate.linear = nn.Sequential(wrapped.experts[0].gate.linear)
    assert "no plain projection" in str(why(wrapped))


def hooked(moe: MoE) -> MoE:
    moe.experts[1].gate.linear.register_forward_hook(lambda *_: None)
    return moe


def test_when_it_is_worth_it(calls: list[int]) -> None:
    moe = made()
    parts = list(moe.experts)
    assert worthwhile(parts, 2) and not worthwhile(parts, 0)
    with torch.no_grad():
        assert worthwhile(parts, 24) and not worthwhile(parts, 23)
        moe(torch.randn(1, 1, 8))
        assert not calls
        moe(torch.randn(4, 8, 8))
        assert len(calls) == 1
    with use_backend("reference"):
        assert not worthwhile(parts, 1000)
