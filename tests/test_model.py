"""The core model: sizes, states, chunks, masks, meter, auxiliary losses, initial weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from spikelm import presets
from spikelm import state as states
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, ShapeError, StateError
from spikelm.model import SpikeLM
from spikelm.neurons import build_neuron
from spikelm.projection import Projection
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context

from .designs import DESIGNS, SMALL, same, small, tokens


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
