"""Decode plans of every architecture but the recurrent RWKV models: one C call is the model's own step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from spikelm import state as states
from spikelm.block import Block
from spikelm.config import ModelConfig
from spikelm.decoding import DecodePlan
from spikelm.errors import KernelError, PlanError, StateError
from spikelm.kernels.compile import compiler_command
from spikelm.kernels.plan.records import library
from spikelm.meter import Meter
from spikelm.mixers.gla import GLA
from spikelm.model import SpikeLM
from spikelm.neurons.base import Neuron
from spikelm.projection import Projection
from spikelm.recurrence import Context, Part
from spikelm.weights import Int8Linear
from tests.contracts.parts import D, cases, randomise

from .stepping import assert_states, assert_steps, python_step, spikes

SMALL = {"num_heads": 4, "head_dim": 8, "hidden": 24, "window": 5, "experts": 4, "gate_rank": 4}
VOCABULARY = 61
T = 14
PRESETS = (
    "spikingbrain-nano",
    "spikingbrain-nano-twin",
    "spikingbrain-moe-nano",
    "spikingbrain2-nano",
    "spikformer-lm-nano",
    "spikformer-lm-nano-twin",
    "spike-driven-lm-nano",
)
TRANSFORMER = {
    "layers": [
        {
            "mixer": {
                "name": "attention",
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 20,
                "qk_norm": True,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 8,
                },
                "partial_rotary_factor": 0.6,
            },
            "channel": {"name": "swiglu", "hidden": 40},
        }
    ],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "vocab_size": VOCABULARY,
    "norm": "rmsnorm",
    "neuron": {"name": "none"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "none": {"neuron": {"name": "none"}},
    "adaptive": {"neuron": {"name": "adaptive", "dead_zone": 0.7}},
    "binary": {
        "neuron": {"name": "plif", "gain": 2.0},
        "neuron_overrides": {"*.experts.*": {"name": "heaviside"}},
    },
    "after": {"placement": "after", "neuron": {"name": "lif", "threshold": 0.3}},
    "binary-embedding": {"embedding_neuron": {"name": "heaviside"}, "neuron": {"name": "adaptive"}},
}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    try:
        compiler_command()
    except KernelError as error:
        pytest.skip(str(error))
    library()  # what does not compile must fail


def shrunk(value: Any) -> Any:
    if isinstance(value, Mapping):
        small = {key: SMALL[key] if key in SMALL else shrunk(entry) for key, entry in value.items()}
        if "num_kv_heads" in small:
            small["num_kv_heads"] = 4 if small["name"] == "gated_delta" else 2
        return small
    return [shrunk(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset with every kind of layer it has, few features, and sinks where it has them."""
    values = ModelConfig.from_yaml(name).to_dict()
    values |= {"layers": shrunk(values["layers"]), "hidden_size": 32, "vocab_size": VOCABULARY}
    values["sink_tokens"] = min(values["sink_tokens"], 3)
    return ModelConfig.from_dict({**values, **changes})


def build(config: ModelConfig) -> SpikeLM:
    torch.manual_seed(0)
    model = SpikeLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(preset(name))
    plan = DecodePlan(model, 1, max_len=T)
    # Windows of 5 have wrapped around twice.
    assert assert_steps(model, plan, some_tokens(T), monkeypatch) >= (T // 2 if spikes(model) else T)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["spikingbrain-moe-nano", "spikingbrain2-nano"])
def test_neurons_stand_anywhere(name: str, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"neuron_overrides": {}, **PLACEMENTS[placement]}
    if name != "spikingbrain-moe-nano":
        changes["neuron_overrides"] = {}
    model = build(preset(name, **changes))
    plan = DecodePlan(model, 1, max_len=T)
    assert assert_steps(model, plan, some_tokens(T), monkeypatch) >= T // 3


def test_transformer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ModelConfig.from_dict(TRANSFORMER))
    assert assert_steps(model, DecodePlan(model, 1, max_len=T), some_tokens(T), monkeypatch) == T


def _host(part: Part) -> SpikeLM:
    """A model that has a part in one of its places."""
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, neuron={"name": "none"}, placement="after"
    )
    model = SpikeLM(config).float().eval()
    randomise(part)
    if isinstance(part, Block):
        model.blocks[1] = part
    elif isinstance(part, Neuron):
        model.blocks[1].channel_neuron = part
    elif isinstance(part, Projection):
        model.blocks[1].mixer = Projection(D, D, part.neuron, bias=True)
    else:
        model.blocks[1].mixer = part
    for name, module in model.named_modules():
        if isinstance(module, Part):
            module.path = name
    return model.float().eval()


@pytest.mark.parametrize(("name", "make"), list(cases()), ids=[name for name, _ in cases()])
def test_part_steps(name: str, make: Callable[[], Part], monkeypatch: pytest.MonkeyPatch) -> None:
    part = make()
    model = _host(part)
    tokens = some_tokens(9)
    if not part.causal:
        with pytest.raises(PlanError, match="not causal"):
            DecodePlan(model, 1, max_len=len(tokens))
        return
    plan = DecodePlan(model, 1, max_len=len(tokens))
    compared = assert_steps(model, plan, tokens, monkeypatch, tolerance=1e-4)
    assert compared >= (3 if spikes(model) else len(tokens))


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_a_row_has_the_bits_it_has_alone(name: str) -> None:
    """Rows of a batch are at different positions, choose different experts, and some do nothing."""
    model = build(preset(name))
    together = DecodePlan(model, 5, max_len=4 * T, threads=2)
    alone = DecodePlan(model, 1, max_len=4 * T, threads=1)
    tokens = some_tokens(T, 4)
    # Row r of step t is in slot `places[r]`, or left out: after 14 steps every slot is somewhere else.
    places = torch.tensor([3, 0, 4, 1])
    seen: dict[int, list[int]] = {slot: [] for slot in places.tolist()}
    for t in range(T):
        active = torch.tensor([(t * (row + 1)) % 3 != 1 for row in range(4)])
        order = torch.randperm(4, generator=torch.Generator().manual_seed(t))
        slots = torch.where(active, places, -1)[order]
        logits = together.step(tokens[t][order].contiguous(), slots.contiguous()).clone()
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                assert not logits[row].any()
                continue
            seen[slot].append(int(tokens[t][order][row]))
    untouched = together.read(2)
    assert_states(untouched, model.init_state(1, max_len=4 * T), 0.0)
    assert len({len(history) for history in seen.values()}) > 1
    for slot, history in seen.items():
        alone.reset(0)
        for token in history:
            last = alone.step(torch.tensor([token])).clone()
        assert_states(together.read(slot), alone.read(0), 0.0)
        again = together.step(torch.tensor([history[0]]), torch.tensor([slot]))
        assert torch.equal(again, alone.step(torch.tensor([history[0]])))
        assert last.shape == again.shape


@pytest.mark.parametrize("name", [*PRESETS, "transformer"])
def test_a_plan_goes_on_from_a_prefilled_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ModelConfig.from_dict(TRANSFORMER) if name == "transformer" else preset(name))
    plan = DecodePlan(model, 3, max_len=3 * T)
    tokens = some_tokens(1, T)
    with torch.no_grad():
        _, state = model(tokens, model.init_state(1, max_len=3 * T))
        plan.write(2, state)
        assert_states(plan.read(2), state, 0.0)
        got = plan.step(tokens[:, 0].contiguous(), torch.tensor([2]))
        wanted, state = python_step(model, tokens[:, 0], state)
    if not spikes(model):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
        assert_states(plan.read(2), state, 1e-5)
    # And back: the model goes on from the plan's state.
    read = plan.read(2)
    with torch.no_grad():
        logits, _ = python_step(model, tokens[:, 1], read)
    assert torch.allclose(logits, plan.step(tokens[:, 1].contiguous(), torch.tensor([2])), atol=0.1)


def test_room_is_checked_before_anything_changes() -> None:
    model = build(preset("spikingbrain-moe-nano"))
    plan = DecodePlan(model, 2, max_len=4)
    state = model.init_state(1, max_len=4)
    pair, token = torch.tensor([1, 2]), torch.tensor([5])
    with torch.no_grad():
        for _ in range(4):
            plan.step(pair)
            _, state = python_step(model, pair[:1], state)
        plan.reset(0)
        before = plan.pool.clone()
        with pytest.raises(StateError) as caught:
            plan.step(pair)  # row 0 has room, row 1 has none
        assert torch.equal(plan.pool, before)
        with pytest.raises(StateError) as own:
            python_step(model, token, state)
    assert str(caught.value) == str(own.value)
    assert "position 4" in str(own.value) and "room for 4" in str(own.value)
    plan.step(token, torch.tensor([0]))


def test_a_window_needs_no_room() -> None:
    model = build(preset("spikingbrain-nano"))
    plan = DecodePlan(model, 1)
    for token in some_tokens(3 * T).split(1):
        logits = plan.step(token)
    assert torch.isfinite(logits).all()
    assert int(plan.read(0)["block1"]["mixer"]["position"]) == 3 * T


def _quantised(config: ModelConfig) -> SpikeLM:
    weights = {"name": "int8", "group_size": 16}
    model = build(ModelConfig.from_dict({**config.to_dict(), "weights": weights}))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.load_float(0.2 * torch.randn(module.out_features, module.in_features))
    return model


@pytest.mark.parametrize(
    "name", ["spikingbrain-nano", "spikingbrain-moe-nano", "spikingbrain2-nano", "spikformer-lm-nano"]
)
def test_int8_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _quantised(preset(name))
    plan = DecodePlan(model, 1, max_len=T)
    assert assert_steps(model, plan, some_tokens(T), monkeypatch) >= T // 2


def test_experts_count_what_they_are_given() -> None:
    """Per projection the plan's statistics are those of the meter, for rows that choose differently."""
    model = build(preset("spikingbrain-moe-nano", neuron_overrides={}))
    plan, meter = DecodePlan(model, 6, max_len=T), Meter()
    tokens = some_tokens(T, 6)
    state = model.init_state(6, max_len=T)
    with torch.no_grad():
        for row in tokens:
            for slot in range(6):  # both from the same state: no spike is ambiguous for long
                plan.write(slot, states.select_rows(state, torch.tensor([slot])))
            plan.step(row.contiguous())
            _, state = model(row[:, None], state, Context(meter=meter))
    counted, found = meter.summary()["projections"], plan.statistics()
    routed = [path for path in counted if ".experts." in path]
    assert len(routed) > 12
    for path, entry in counted.items():
        assert found[path]["calls"] == entry["tokens"], path
        inputs = entry["tokens"] * entry["in_features"]
        assert found[path]["silent"] == pytest.approx(entry["silent"] * inputs, abs=2)
        magnitude = entry["mean_count"] * inputs if entry["spiking"] else 0
        assert found[path]["magnitude"] == pytest.approx(magnitude, abs=2)
    assert all(entry["calls"] == 0 for path, entry in found.items() if path not in counted)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@torch.no_grad()
def test_experts_have_the_bits_of_the_model(router: str) -> None:
    """Where everything else is exact per row, a mixture is too: logits, states, and every count."""
    moe = {"name": "moe", "experts": 6, "top_k": 3, "shared": 1, "hidden": 24, "router": router}
    config = {
        "layers": [{"mixer": {"name": "wkv4"}, "channel": moe}],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "vocab_size": VOCABULARY,
        "neuron": {"name": "adaptive", "dead_zone": 0.5},
        "head_neuron": {"name": "adaptive"},
        "tie_word_embeddings": False,
        "weight_overrides": {"head": {"name": "int8"}},
    }
    model = _quantised(ModelConfig.from_dict(config))
    plan, meter = DecodePlan(model, 6), Meter()
    state, tokens = model.init_state(6), some_tokens(T, 6)
    for row in tokens:
        wanted, state = model(row[:, None], state, Context(meter=meter))
        assert torch.equal(plan.step(row.contiguous()), wanted[:, 0])
    for slot in range(6):
        assert_states(plan.read(slot), states.select_rows(state, torch.tensor([slot])), 0.0)
    counted, found = meter.summary()["projections"], plan.statistics()
    for path, entry in found.items():
        inputs = counted.get(path, {}).get("tokens", 0) * entry["in_features"]
        assert entry["calls"] * entry["in_features"] == inputs
        if inputs:
            assert entry["silent"] == round(counted[path]["silent"] * inputs)
            assert entry["magnitude"] == round(counted[path]["mean_count"] * inputs)
    assert len({entry["calls"] for path, entry in found.items() if ".experts." in path}) > 2


def test_equal_scores_choose_the_first_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(preset("spikingbrain-moe-nano", neuron={"name": "none"}, neuron_overrides={}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.linear.weight"):
                parameter.zero_()
    plan = DecodePlan(model, 2, max_len=T)
    assert assert_steps(model, plan, some_tokens(T), monkeypatch) == T
    calls = {path: entry["calls"] for path, entry in plan.statistics().items() if ".experts." in path}
    assert all((count == T) == (".experts.0." in path) for path, count in calls.items())


class _Foreign(Part):
    """Somebody else's mixer: it has a step and no records."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def step(self, x: torch.Tensor, state: states.State, ctx: Context) -> tuple[torch.Tensor, states.State]:
        return self.linear(x), state


def test_what_has_no_records_is_named() -> None:
    model = build(preset("spikingbrain-nano"))
    model.blocks[2].mixer = _Foreign()
    model.blocks[2].mixer.path = "blocks.2.mixer"
    with pytest.raises(PlanError, match=r"blocks\.2\.mixer.*_Foreign"):
        DecodePlan(model, 1)


class _Leaky(GLA):
    """Somebody else's gate in our mixer."""

    def gate(
        self, x: torch.Tensor, raw_key: torch.Tensor, state: states.State, ctx: Context
    ) -> tuple[torch.Tensor | None, states.State]:
        g, new = super().gate(x, raw_key, state, ctx)
        return None if g is None else 2.0 * g, new


def test_records_of_another_method_are_refused() -> None:
    model = build(preset("spikingbrain-nano"))
    model.blocks[2].mixer.__class__ = _Leaky
    with pytest.raises(PlanError, match=r"blocks\.2\.mixer \(_Leaky\).*gate.*lower_gate"):
        DecodePlan(model, 1)


def test_a_model_that_grows_needs_max_len() -> None:
    model = build(ModelConfig.from_dict(TRANSFORMER))
    with pytest.raises(StateError, match="max_len"):
        DecodePlan(model, 1)
