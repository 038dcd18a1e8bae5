"""What a meter counts, and what firing-rate targets make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.neurons import build_neuron
from spikelm.recurrence import Context

from .designs import SMALL, same, small, tokens


def test_meter_sees_spikes_in_every_projection_of_a_spike_driven_model() -> None:
    model, meter = small("spike-driven"), Meter(raster=["blocks.1.channel.key"])
    model(tokens(2, 9), ctx=Context(meter=meter))
    summary = meter.summary()
    inside = {path: entry for path, entry in summary["projections"].items() if path != "head"}
    assert len(inside) == 3 * 7
    assert all(entry["spiking"] for entry in inside.values())
    assert not summary["projections"]["head"]["spiking"]
    assert 0 < summary["total"]["silent"] < 1
    (raster,) = meter.rasters["blocks.1.channel.key"]
    assert raster.shape == (2, 9, 12) and torch.equal(raster, raster.round()) and raster.abs().max() <= 127
    entry = inside["blocks.1.channel.key"]
    assert entry["firing_rate"] == pytest.approx(float((raster != 0).double().mean()))
    assert entry["mean_count"] == pytest.approx(float(raster.double().abs().mean()))
    dense = sum(e["in_features"] * e["out_features"] for e in summary["projections"].values())
    assert summary["total"]["dense_macs"] == dense
    assert summary["total"]["spiking_share"] == pytest.approx(1 - 12 * 19 / dense)


def test_meter_calls_the_published_design_dense_and_skips_padding() -> None:
    model, meter = small("published"), Meter()
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 4:] = False
    model(tokens(2, 9), ctx=Context(meter=meter, valid=valid))
    summary = meter.summary()
    assert summary["total"]["spiking_share"] == 0.0
    assert summary["projections"]["blocks.0.mixer.key"]["tokens"] == 13
    assert set(summary["neurons"]) == {
        "embedding_neuron",
        *(f"blocks.{i}.{part}_neuron" for i in range(3) for part in ("mixer", "channel")),
    }
    assert summary["neurons"]["blocks.0.mixer_neuron"]["tokens"] == 13
    assert 0 < summary["neurons"]["blocks.1.channel_neuron"]["firing_rate"] < 1


def test_meter_counts_what_is_there() -> None:
    meter = Meter()
    x = torch.tensor([[0.0, 3.0, -4.0, 0.0], [0.0, 4.0, 0.0, 0.0]])
    for _ in range(2):
        meter.record("p", x, spiking=True, out_features=5, valid=None, cap=4)
    entry = meter.summary()["projections"]["p"]
    assert entry["tokens"] == 4 and entry["firing_rate"] == 3 / 8 and entry["mean_count"] == 11 / 8
    assert entry["at_cap"] == 2 / 8 and entry["never_fired"] == 2 / 4


def test_meter_outlives_inference_mode() -> None:
    model, meter = small(), Meter()
    with torch.inference_mode():
        model(tokens(2, 3), ctx=Context(meter=meter))
    model(tokens(2, 4), ctx=Context(meter=meter))
    assert meter.summary()["projections"]["head"]["tokens"] == 14


@pytest.mark.parametrize(
    "neuron", [{"name": "plif", "gain": 1.0}, {"name": "adaptive"}, {"name": "heaviside"}, {"name": "if"}]
)
def test_rate_target_moves_the_firing_rate(neuron: dict[str, Any]) -> None:
    """Training on the auxiliary loss alone brings the rate near its target."""
    torch.manual_seed(0)
    target = 0.3
    config = {**SMALL, "num_hidden_layers": 1, "neuron": {**neuron, "rate_target": {"target": target}}}
    model = SpikeLM(ModelConfig.from_dict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = tokens(4, 16)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    distances = []
    for _ in range(60):
        losses: list[Tensor] = []
        meter = Meter()
        model(ids, ctx=Context(losses=losses, meter=meter))
        assert len(losses) == 7
        rates = [e["firing_rate"] for p, e in meter.summary()["projections"].items() if p != "head"]
        distances.append(sum(abs(rate - target) for rate in rates) / 7)
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
    assert distances[-1] < 0.6 * distances[0]


def test_rate_target_counts_real_tokens_only() -> None:
    neuron = build_neuron({"name": "heaviside", "rate_target": {"target": 0.0}}, 4)
    x = torch.ones(2, 6, 4)
    x[:, 3:] = -1
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[:, 3:] = False
    losses: list[Tensor] = []
    neuron(x, {}, Context(losses=losses, valid=valid))
    assert float(losses[0]) == pytest.approx(1.0), "all of the real tokens fire"


def test_rate_target_schedule() -> None:
    spec = {"name": "lif", "rate_target": {"target": 0.1, "weight": 2.0, "start": 10, "ramp": 20}}
    model = small(neuron=spec)
    values = {}
    for step in (9, 10, 20, 30, 99):
        losses: list[Tensor] = []
        model(tokens(2, 5), ctx=Context(losses=losses, step=step))
        values[step] = float(torch.stack(losses).sum().detach()) if losses else 0.0
    assert values[9] == values[10] == 0.0
    assert values[20] == pytest.approx(values[30] / 2) and values[30] == values[99] > 0


def test_checkpointing_adds_each_loss_once_and_meters_once() -> None:
    spec = {"name": "adaptive", "rate_target": {"target": 0.1}}
    results = []
    for recompute in (False, True):
        model = small(neuron=spec)
        model.gradient_checkpointing = recompute
        losses: list[Tensor] = []
        meter = Meter()
        logits, _ = model(tokens(2, 7), ctx=Context(losses=losses, meter=meter))
        (logits.square().mean() + torch.stack(losses).sum()).backward()
        assert meter.summary()["projections"]["blocks.0.mixer.key"]["tokens"] == 14
        results.append((len(losses), [p.grad for p in model.parameters()]))
    assert results[0][0] == results[1][0] == 21
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        same(plain, recomputed)
