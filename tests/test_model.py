"""The core model: sizes, states, chunks, masks, meter, auxiliary losses, initial weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm import presets
from spikelm import state as states
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, ShapeError, StateError
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.neurons import build_neuron
from spikelm.projection import Projection
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context

SMALL = {"vocab_size": 19, "hidden_size": 12, "num_hidden_layers": 3}
DESIGNS: dict[str, dict[str, Any]] = {
    "published": {
        "placement": "after",
        "neuron": {"name": "lif"},
        "embedding_neuron": {"name": "heaviside"},
    },
    "spike-driven": {"neuron": {"name": "adaptive", "dead_zone": 1.0}},
    "binary": {"neuron": {"name": "plif", "gain": 2.0}, "head_neuron": {"name": "lif", "threshold": 0.5}},
    "twin": {"neuron": {"name": "none"}},
}


def small(design: str = "spike-driven", **values: Any) -> SpikeLM:
    torch.manual_seed(2)
    model = SpikeLM(ModelConfig.from_dict({**SMALL, **DESIGNS[design], **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 19, shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("design", DESIGNS)
def test_decoding_is_training_forward(design: str) -> None:
    """One function: token by token, in chunks and whole give the same logits and state."""
    model, ids = small(design), tokens(2, 11)
    whole, end = model(ids)
    state, steps = None, []
    for t in range(ids.shape[1]):
        logits, state = model(ids[:, t], state)
        steps.append(logits)
    same(torch.stack(steps, 1), whole)
    first, middle = model(ids[:, :4])
    second, last = model(ids[:, 4:], middle)
    same(torch.cat([first, second], 1), whole)
    for name, value in states.flatten(end).items():
        same(states.flatten(state)[name], value)
        same(states.flatten(last)[name], value)


@pytest.mark.parametrize("design", DESIGNS)
def test_packed_documents_do_not_leak(design: str) -> None:
    model, ids = small(design), tokens(2, 12)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 5] = True
    packed, _ = model(ids, ctx=Context(reset=reset))
    alone, _ = model(ids[:, 5:])
    same(packed[:, 5:], alone)
    same(packed[:, :5], model(ids[:, :5])[0])


@pytest.mark.parametrize("design", DESIGNS)
def test_last_only_is_the_last_column(design: str) -> None:
    model, ids = small(design), tokens(2, 6)
    whole, end = model(ids)
    last, state = model(ids, last_only=True)
    same(last, whole[:, -1:])
    assert states.flatten(state).keys() == states.flatten(end).keys()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_only_with_padding_is_the_last_real_token(design: str, side: str) -> None:
    model, ids = small(design), tokens(2, 6)
    plain, _ = model(ids, last_only=True)
    pad = torch.zeros(2, 3, dtype=torch.long)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, slice(0, 3) if side == "left" else slice(6, 9)] = False
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    logits, _ = model(padded, ctx=Context(valid=valid), last_only=True)
    same(logits, plain)
    everywhere, _ = model(padded, ctx=Context(valid=valid))
    assert not everywhere[~valid].any(), "outputs are zero where a token is invalid"
    hidden, _ = model.hidden(padded, ctx=Context(valid=valid))
    assert not hidden[~valid].any()
    nothing, _ = model(padded, ctx=Context(valid=torch.zeros_like(valid)), last_only=True)
    assert not nothing.any()


@pytest.mark.parametrize("design", DESIGNS)
def test_masks_hold_for_single_steps_too(design: str) -> None:
    model, ids = small(design), tokens(3, 5)
    _, state = model(ids)
    one = ids[:, 0]
    reset = torch.tensor([True, False, True])
    logits, new = model(one, state, Context(reset=reset))
    same(logits[reset], model(one[reset])[0])
    same(logits[~reset], model(one, state)[0][~reset])
    logits, new = model(one, state, Context(valid=~reset))
    assert not logits[reset].any()
    kept = torch.nonzero(reset)[:, 0]
    for name, value in states.flatten(states.select_rows(new, kept)).items():
        same(value, states.flatten(states.select_rows(state, kept))[name])
    with pytest.raises(ShapeError, match="single step"):
        model.blocks[0].mixer(torch.zeros(3, 12, dtype=torch.float64), None, Context(reset=reset))


def test_published_sizes() -> None:
    with torch.device("meta"):
        assert SpikeLM(ModelConfig.from_yaml("spikegpt-216m")).num_parameters() == 215_399_424
        assert SpikeLM(ModelConfig.from_yaml("spikegpt-46m")).num_parameters() == 41_226_240
        characters = ModelConfig.from_yaml("spikegpt-46m", vocab_size=6064)
        assert round(SpikeLM(characters).num_parameters() / 1e6, 2) == 47.17


@pytest.mark.parametrize("size", ["spikegpt-nano", "spikegpt-46m", "spikegpt-216m"])
def test_presets_of_a_size_differ_in_their_neurons_only(size: str) -> None:
    published = ModelConfig.from_yaml(size)
    assert published.placement == "after" and published.neuron["name"] == "lif"
    twins = [ModelConfig.from_yaml(f"{size}{kind}").twin().to_dict() for kind in ("-sd", "-lif", "-twin")]
    assert twins[0] == twins[1] == twins[2]
    spike_driven = ModelConfig.from_yaml(f"{size}-sd")
    assert spike_driven.neuron == {"name": "adaptive", "k": 3.0, "dead_zone": 1.4, "cap": 127}
    assert {f"{size}{kind}" for kind in ("", "-sd", "-lif", "-twin")} <= set(presets.names("models"))


def test_twin_has_no_neurons_left() -> None:
    config = ModelConfig.from_dict(
        {**SMALL, **DESIGNS["published"], "neuron_overrides": {"*": {"name": "if"}}}
    )
    twin = SpikeLM(config.twin())
    assert {type(m).__name__ for n, m in twin.named_modules() if n.endswith("neuron")} == {"Identity"}


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


@torch.no_grad()
def test_scale_keeps_its_precision_in_low_precision_weights() -> None:
    torch.manual_seed(0)
    projection = Projection(64, 8, build_neuron({"name": "adaptive"}, 64))
    x = 1e-6 * torch.randn(5, 64)
    exact, _ = projection(x)
    counts, scale, _ = projection.neuron.encode(x, {}, Context())
    assert scale is not None and scale.dtype == torch.float32
    low, _ = projection.bfloat16()(x)
    torch.testing.assert_close(low.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    # In float16 this threshold is subnormal (steps of 6e-8): rounded first, it would be off by a tenth.
    projection = projection.float()
    projection.linear.weight.mul_(1000)
    x = x.half()
    wanted, _ = projection(x.float())
    half, _ = projection.half()(x)
    torch.testing.assert_close(half.float(), wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max()))


def test_overrides_reach_single_projections() -> None:
    model = small(
        neuron_overrides={"blocks.*.channel.value": {"name": "none"}, "head": {"name": "heaviside"}}
    )
    assert type(model.blocks[2].channel.value.neuron).__name__ == "Identity"
    assert type(model.blocks[2].channel.key.neuron).__name__ == "Adaptive"
    assert model.head is not None and type(model.head.neuron).__name__ == "Heaviside"


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


def test_dropout_depends_on_place_not_on_chunking() -> None:
    model, ids = small("twin", dropout=0.5).train(), tokens(2, 10)

    def random(start: int, stop: int) -> Context:
        position = torch.arange(start, stop).expand(2, -1)
        return Context(random=CounterRandom(seed=7, stream=torch.tensor([5, 8]), position=position))

    whole, _ = model(ids, ctx=random(0, 10))
    first, state = model(ids[:, :3], ctx=random(0, 3))
    second, _ = model(ids[:, 3:], state, random(3, 10))
    same(torch.cat([first, second], 1), whole)
    assert (whole - model(ids)[0]).abs().max() > 0.01
    same(model.eval()(ids, ctx=random(0, 10))[0], model(ids)[0])


def test_dropout_keeps_the_mean() -> None:
    model = small("twin", dropout=0.25).train()
    position = torch.arange(500).expand(4, -1)
    ctx = Context(random=CounterRandom(seed=7, stream=torch.arange(4), position=position))
    y = model._dropout(torch.ones(4, 500, 12), "blocks.0", ctx)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
    assert model._dropout(torch.ones(1), "blocks.0", Context()).item() == 1.0


def test_seeds_share_no_numbers() -> None:
    position = torch.arange(8).expand(6, 8)
    rows = [
        CounterRandom(seed=seed, stream=torch.arange(6), position=position).uniform("a", 4)
        for seed in (0, 1, 2, 1 << 40)
    ]
    flat = torch.cat(rows).reshape(-1, 8 * 4)
    assert len(flat.unique(dim=0)) == len(flat), "two seeds draw the same row"


def test_counter_random_is_uniform_and_has_no_visible_structure() -> None:
    random = CounterRandom(seed=1, stream=torch.arange(8), position=torch.arange(64).expand(8, 64))
    u = random.uniform("a", 64)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    rows = torch.corrcoef(u.reshape(512, 64)).fill_diagonal_(0)
    assert rows.abs().max() < 6 / 8, "rows correlate more than chance allows"
    columns = torch.corrcoef(u.reshape(512, 64).T).fill_diagonal_(0)
    assert columns.abs().max() < 6 / 512**0.5, "channels correlate more than chance allows"
    assert torch.equal(random.uniform("a", 63), u[..., :63])
    assert (u - random.uniform("b", 64)).abs().mean() > 0.3


@torch.no_grad()
def test_initial_weights_follow_the_table() -> None:
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_dict({**SMALL, "hidden_size": 16}))
    mixer, channel = model.blocks[1].mixer, model.blocks[1].channel
    for projection in (mixer.key, mixer.receptance, mixer.output, channel.value, channel.receptance):
        assert not projection.linear.weight.any()
    gram = mixer.value.linear.weight @ mixer.value.linear.weight.T
    torch.testing.assert_close(gram, torch.eye(16), rtol=0, atol=1e-5)
    gram = channel.key.linear.weight.T @ channel.key.linear.weight
    torch.testing.assert_close(gram, 4 * torch.eye(16), rtol=0, atol=1e-5)
    assert float(mixer.time_decay[0]) == -5 and float(mixer.time_decay[-1]) == pytest.approx(3)
    assert float(mixer.time_decay[4]) == pytest.approx(-5 + 8 * (4 / 15) ** (0.7 + 1.3 * 0.5), abs=1e-5)
    assert float(mixer.time_first[2]) == pytest.approx(math.log(0.3) - 0.5)
    assert float(mixer.mix_k[4]) == pytest.approx((4 / 16) ** (1 - 1 / 3), abs=1e-6)
    assert float(mixer.mix_v[4]) == pytest.approx((4 / 16) ** (1 - 1 / 3) + 0.15, abs=1e-6)
    assert float(mixer.mix_r[4]) == pytest.approx((4 / 16) ** (0.5 * (1 - 1 / 3)), abs=1e-6)
    assert 5e-5 < float(model.embedding.weight.std()) < 2e-4
    assert model.head is not None
    head = model.head.linear.weight
    torch.testing.assert_close(head.T @ head, 0.25 * 19 / 16 * torch.eye(16), rtol=0, atol=1e-5)


def test_bad_input_is_refused_in_one_sentence() -> None:
    model = small()
    with pytest.raises(ShapeError, match=r"\[B, T\] or \[B\]"):
        model(tokens(2, 3, 4))
    with pytest.raises(ShapeError, match="at least one token"):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ShapeError, match="token ids"):
        model(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="-1 to 19; expected 0 to 18"):
        model(torch.tensor([[-1, 19]]))
    _, state = model(tokens(2, 3))
    with pytest.raises(StateError, match="2 sequences and tokens 3"):
        model(tokens(3, 3), state)
    with pytest.raises(ShapeError, match="reset"):
        model(tokens(2, 3), ctx=Context(reset=torch.zeros(2, 4, dtype=torch.bool)))
    with pytest.raises(ShapeError, match="valid"):
        model(tokens(2, 3), ctx=Context(valid=torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 3}, "hidden_size"),
        ({"hidden_size": 0}, "from 1 to"),
        ({"neuron": {"name": "liff"}}, "'lif'"),
        ({"neuron": {"name": "lif", "tua": 2}}, "'tau'"),
        ({"neuron": {"name": "lif", "tau": 0.5}}, "at least 1"),
        ({"neuron": {"name": "none", "rate_target": {"target": 0.1}}}, "rate_target"),
        ({"neuron": {"name": "lif", "rate_target": {"taget": 0.1}}}, "target"),
        ({"neuron": {"name": "adaptive", "cap": 500}}, "int8"),
        ({"neuron": {"name": "adaptive", "k": "abc"}}, "k of neuron 'adaptive' is 'abc'; expected a finite"),
        ({"neuron": {"name": "adaptive", "cap": 7.5}}, "a whole number"),
        ({"neuron": {"name": "lif", "tau": "abc"}}, "a finite number"),
        ({"neuron": {"name": "lif", "threshold": float("inf")}}, "a finite number"),
        ({"neuron": {"name": "lif", "detach_reset": "no"}}, "true or false"),
        ({"neuron": {"name": "lif", "decay_input": 3}}, "true or false"),
        ({"neuron": {"name": "lif", "gain": "x"}}, "a finite number or null"),
        ({"neuron": {"name": "heaviside", "threshold": "abc"}}, "a finite number"),
        ({"neuron": {"name": "lif", "rate_target": 0.2}}, "a mapping or null"),
        ({"neuron": {"name": "lif", "rate_target": {"target": "abc"}}}, "rate_target.target is 'abc'"),
        ({"layers": [{"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv", "expand": "a"}}]}, "finite"),
        ({"hidden_size": 10**9}, "16777215"),
        ({"neuron": {"name": "lif", "surrogate": "arctan"}}, "atan"),
        ({"neuron": {"tau": 2}}, "name"),
        ({"layers": [{"mixer": {"name": "wkv5"}, "channel": {"name": "rwkv"}}]}, "wkv4"),
        ({"layers": [{"mixer": {"name": "wkv4"}}]}, "mixer and channel"),
        ({"layers": [{"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv"}}] * 4}, "at most"),
        ({"placement": "inside"}, "before"),
        ({"tie_word_embeddings": "no"}, "true or false"),
        ({"neuron_overrides": {"blocks.*.chanel.value": {"name": "lif"}}}, "channel.value"),
        ({"neuron_overrides": {"blocks.0.mixer_neuron": {"name": "lif"}}}, "blocks.0.mixer"),
        ({"eos_token_id": 99}, "vocabulary"),
        ({"dropout": 2}, "dropout"),
    ],
)
def test_bad_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    from spikelm.errors import SpikeLMError

    with pytest.raises(SpikeLMError, match=message):
        SpikeLM(ModelConfig.from_dict({**SMALL, **values}))


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="spikegpt-46m-sd"):
        ModelConfig.from_yaml("spikegpt-46-sd")
