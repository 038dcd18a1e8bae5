"""GraphDecode: the model's own steps on a pool of slots (captured only where there is a GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm import state as states
from spikelm.config import ModelConfig
from spikelm.errors import PlanError, StateError
from spikelm.graph_decoding import GraphDecode, host_read, lay_out
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.state import State

ADAPTIVE = {"placement": "before", "neuron": {"name": "adaptive", "dead_zone": 0.5}}
EXPERTS = {"name": "moe", "experts": 4, "hidden": 16}
MODELS: dict[str, dict[str, Any]] = {
    "spiking": ADAPTIVE,
    "int8": {**ADAPTIVE, "weights": {"name": "int8", "group_size": 8}},
    "membranes": {"placement": "before", "neuron": {"name": "plif", "gain": 1.5}, "sink_tokens": 2},
    "linear": {
        **ADAPTIVE,
        "layers": [{"mixer": {"name": name}, "channel": {"name": "rwkv"}} for name in ("gla", "gated_delta")],
    },
    "hybrid": {
        **ADAPTIVE,
        "layers": [
            {"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv"}},
            {"mixer": {"name": "attention", "num_heads": 4}, "channel": {"name": "rwkv"}},
        ],
    },
    "experts": {**ADAPTIVE, "layers": [{"mixer": {"name": "wkv4"}, "channel": EXPERTS}]},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SpikeLM:
    torch.manual_seed(0)
    options = MODELS[name]
    model = SpikeLM(ModelConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if hasattr(module, "load_float"):
                module.load_float(torch.randn(module.out_features, module.in_features))
    return model.to(device, dtype).eval()


def one_by_one(model: SpikeLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    with torch.no_grad():
        logits, state = model(tokens[:, None], state)
    return logits[:, 0], state


def equal(a: State, b: State) -> None:
    flat = states.flatten(b)
    for name, value in states.flatten(a).items():
        assert torch.equal(value, flat[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_bits_of_the_models_own_steps(name: str, device: str) -> None:
    """A batch of the captured size runs the same kernels as the model itself: the same bits, every step."""
    model = build(name, device)
    plan = GraphDecode(model, 5, batch_sizes=(3,), max_len=20, capture=device == "cuda")
    slots = torch.tensor([4, 0, 2])
    with torch.no_grad():
        state = model.init_state(3, max_len=20)
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        tokens = torch.randint(0, 29, (3,), generator=generator)
        logits = plan.step(tokens, slots)
        expected, state = one_by_one(model, tokens.to(device), state)
        assert logits.dtype == torch.float32
        if name == "hybrid":  # the ring is read whole, and sums over more (zero) terms round another way
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            continue
        assert torch.equal(logits, expected)
        for row, slot in enumerate(slots.tolist()):
            equal(plan.read(slot), states.select_rows(state, torch.tensor([row], device=device)))
    with torch.no_grad():
        initial = model.init_state(1, max_len=20)
    for untouched in (1, 3):
        equal(plan.read(untouched), initial)
    plan.reset(4)
    equal(plan.read(4), initial)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_negative_slots_and_changing_batches(device: str) -> None:
    """float64: what other rows of the batch do changes no row beyond rounding."""
    model = build("linear", device, torch.float64)
    plan = GraphDecode(model, 4, batch_sizes=(2, 5), capture=device == "cuda")
    own = {slot: model.init_state(1) for slot in range(4)}
    steps = [
        ([3, 1], [5, 7]),
        ([0], [1]),
        ([-1, 2, -3], [0, 9, 28]),
        ([1, 0, 3, 2], [4, 4, 4, 4]),
        ([-1], [3]),
    ]
    for slots, tokens in steps:
        logits = plan.step(torch.tensor(tokens), torch.tensor(slots))
        assert logits.shape == (len(slots), 29) and logits.dtype == torch.float64
        for row, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            if slot < 0:
                assert not logits[row].any()
                continue
            expected, own[slot] = one_by_one(model, torch.tensor([token], device=device), own[slot])
            torch.testing.assert_close(logits[row], expected[0], rtol=1e-11, atol=1e-11)
        for slot, state in own.items():
            flat = states.flatten(plan.read(slot))
            for name, value in states.flatten(state).items():
                torch.testing.assert_close(flat[name], value, rtol=1e-11, atol=1e-11)
    equal(states.tree_map(lambda value: value[4:], plan.pool), model.init_state(1))


def test_slots_are_written_read_and_copied() -> None:
    model = build("spiking")
    plan = GraphDecode(model, 3, batch_sizes=(1, 2), capture=False)
    with torch.no_grad():
        prompt = torch.arange(7)[None]
        logits, state = model(prompt, model.init_state(1))
    plan.write(1, state)
    equal(plan.read(1), state)
    plan.write(2, plan.read(1))
    both = plan.step(torch.tensor([3, 3]), torch.tensor([1, 2]))
    assert torch.equal(both[0], both[1])
    copy = plan.read(1)
    plan.step(torch.tensor([4]), torch.tensor([1]))
    equal(plan.read(2), copy)
    assert torch.equal(plan.step(torch.tensor([4, 5])), plan.step(torch.tensor([4, 5]), None)) is False


def test_what_it_refuses() -> None:
    model = build("spiking")
    with pytest.raises(PlanError, match="CUDA graphs hold CUDA kernels and the model is on cpu"):
        GraphDecode(model, 2)
    with pytest.raises(PlanError, match="expected whole numbers from 1"):
        GraphDecode(model, 2, batch_sizes=(0,), capture=False)
    with pytest.raises(PlanError, match="call model.eval"):
        GraphDecode(build("spiking").train(), 2, capture=False)
    plan = GraphDecode(model, 2, batch_sizes=(2,), capture=False)
    before = plan.read(0)
    for tokens, slots, sentence in (
        ([1, 2, 3], None, "a batch of 3; expected 1 to 2"),
        ([1], [2], "slot 2; the plan has slots 0 to 1"),
        ([1, 2], [0, 0], r"slots \[0, 0\] name one twice"),
        ([29], [0], "token 29; expected ids from 0 to 28"),
        ([1], [0, 1], "2 slots for 1 tokens"),
    ):
        with pytest.raises(PlanError, match=sentence):
            plan.step(torch.tensor(tokens), None if slots is None else torch.tensor(slots))
    with pytest.raises(PlanError, match=r"tokens are torch.int64 \[1, 1\]; expected int64 \[B\]"):
        plan.step(torch.tensor([[1]]), torch.tensor([0]))
    with pytest.raises(PlanError, match="slot is 2; the plan has slots 0 to 1"):
        plan.read(2)
    with pytest.raises(StateError, match="does not fit the model"):
        plan.write(0, {"embedding": {}})
    equal(plan.read(0), before)


def test_what_reads_values_on_the_host_is_named() -> None:
    """No graph can hold it: on a GPU the model is refused with this sentence."""
    for name in ("spiking", "membranes", "linear"):
        model = build(name)
        assert host_read(model, model.init_state(1)) is None
    model = build("hybrid")
    assert host_read(model, model.init_state(1, max_len=8)) is None
    model = build("experts")
    found = host_read(model, model.init_state(1))  # experts learn on the host how many tokens each has
    assert found is not None and "channel" in found and "reads a value on the host" in found, found


def test_full_memory_is_refused_before_anything_changes() -> None:
    model = build("hybrid", dtype=torch.float64)
    plan = GraphDecode(model, 2, batch_sizes=(1, 2), max_len=5, capture=False)
    with torch.no_grad():
        _, state = model(torch.arange(3)[None], model.init_state(1, max_len=5))
        plan.write(1, state)
        for token in (7, 8):
            logits = plan.step(torch.tensor([token]), torch.tensor([1]))
            expected, state = model(torch.tensor([[token]]), state)
            torch.testing.assert_close(logits, expected[:, 0], rtol=1e-11, atol=1e-11)
    before = plan.read(0)
    with pytest.raises(PlanError, match="slot 1 is full: its memory has room for 5 tokens; reset it"):
        plan.step(torch.tensor([1, 1]), torch.tensor([0, 1]))
    equal(plan.read(0), before)
    plan.reset(1)
    plan.step(torch.tensor([1, 1]), torch.tensor([0, 1]))


def test_weights_of_silent_inputs_are_laid_out_by_inputs() -> None:
    model = build("int8")
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        before, _ = model(tokens, model.init_state(1))
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        paths = [
            name
            for name, part in model.named_modules()
            if isinstance(part, Projection) and "head" not in name
        ]
        model.firing = {path: 0.9 if number % 2 else 0.1 for number, path in enumerate(paths)}
        assert lay_out(model) == len(paths) // 2
        for number, path in enumerate(paths):
            weight = model.get_submodule(path).linear.weight
            assert weight.stride(0) == (1 if number % 2 else weight.shape[1])
        after, _ = model(tokens, model.init_state(1))
    assert torch.equal(before, after)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
