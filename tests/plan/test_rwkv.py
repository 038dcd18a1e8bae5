"""RWKV models in a decode plan: the bits of the model where its path is one of integers, close elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spikelm.decoding import DecodePlan
from spikelm.errors import KernelError
from spikelm.kernels.compile import compiler_command
from spikelm.weights import Int8Linear

from .models import INT8, INT8_HEAD, NEURONS, in_plan, in_python, model_of, row_of, same_state, tokens_of

STEPS = 12


@pytest.fixture(autouse=True)
def _needs_c() -> None:
    """Where there is a compiler, C that does not compile is a failure."""
    try:
        compiler_command()
    except KernelError as error:
        pytest.skip(f"no C kernels: {error}")


INTEGER_PATHS = {
    **{name: {"neuron": spec} for name, spec in NEURONS.items() if name != "none"},
    "one-scale": {"neuron": NEURONS["adaptive"], "weights": {"name": "int8", "group_size": None}},
    "ragged-groups": {"neuron": NEURONS["adaptive"], "weights": {"name": "int8", "group_size": 24}},
    "rmsnorm": {"neuron": NEURONS["adaptive"], "norm": "rmsnorm"},
    "no-embedding-norm": {"neuron": NEURONS["adaptive"], "embedding_norm": False},
    "binary-embedding": {"neuron": NEURONS["adaptive"], "embedding_neuron": {"name": "heaviside"}},
    "sinks": {"neuron": NEURONS["adaptive"], "sink_tokens": 3},
    "mixed": {
        "neuron": NEURONS["lif"],
        "neuron_overrides": {"blocks.*.channel.value": NEURONS["adaptive"]},
    },
}


@pytest.mark.parametrize("name", INTEGER_PATHS)
def test_integer_paths_have_the_bits_of_the_model(name: str) -> None:
    """Logits and state: token by token, at once, in a batch, alone, and with three threads."""
    model = model_of(**{**INT8, **INT8_HEAD, **INTEGER_PATHS[name]})
    tokens = tokens_of(4, STEPS)
    with torch.no_grad():
        whole, _ = model(tokens)
    expected, state = in_python(model, tokens)
    assert torch.equal(whole, expected)
    plan, alone, threaded = DecodePlan(model, 4), DecodePlan(model, 1), DecodePlan(model, 4, threads=3)
    found = in_plan(plan, tokens)
    assert torch.equal(found, expected)
    assert found.std() > 0.1 and not torch.equal(found[0], found[1])
    assert torch.equal(in_plan(threaded, tokens), expected)
    assert torch.equal(in_plan(alone, tokens[2:3]), expected[2:3])
    for row in range(4):
        assert same_state(plan.read(row), row_of(state, row))
        assert same_state(threaded.read(row), row_of(state, row))
    assert same_state(alone.read(0), row_of(state, 2))


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_both_layouts_of_packed_weights(layout: str) -> None:
    model = model_of(**INT8, **INT8_HEAD, neuron=NEURONS["adaptive"])
    tokens = tokens_of(3, STEPS)
    expected, _ = in_python(model, tokens)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.pack_(layout)
    plan = DecodePlan(model, 3)
    assert torch.equal(in_plan(plan, tokens), expected)
    entry = plan.statistics()["blocks.0.mixer.key"]
    read = 3 * STEPS * 40 - entry["silent"] if layout == "in_out" else STEPS * 40
    assert entry["bytes"] == 40 * read


FLOAT_PATHS: dict[str, dict[str, Any]] = {
    "twin": {"neuron": NEURONS["none"]},
    "tied": {"neuron": NEURONS["none"], "tie_word_embeddings": True},
    "spiking-tied-head": {
        "neuron": NEURONS["none"],
        "tie_word_embeddings": True,
        "head_neuron": NEURONS["lif"],
    },
    "int8-without-neurons": {"neuron": NEURONS["none"], **INT8},
    "rmsnorm": {"neuron": NEURONS["none"], "norm": "rmsnorm", "embedding_norm": False},
}


@pytest.mark.parametrize("name", FLOAT_PATHS)
def test_float_paths_are_close(name: str) -> None:
    """Sums of up to 104 products in another order, three layers deep: 1e-5 of logits of about 3."""
    model = model_of(**FLOAT_PATHS[name])
    tokens = tokens_of(3, STEPS)
    expected, state = in_python(model, tokens)
    plan = DecodePlan(model, 3)
    torch.testing.assert_close(in_plan(plan, tokens), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(plan.read(1), row_of(state, 1), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in NEURONS if name != "none"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_spikes_over_float_weights(placement: str, name: str) -> None:
    """From the model's own state at every token, so that a spike at the edge stays the matter of one token.

    A float sum may be rounded across a threshold; such a token moves single spikes and is left out. At least
    90% of the tokens must be free of it.
    """
    model = model_of(neuron=NEURONS[name], placement=placement)
    plan = DecodePlan(model, 1)
    tokens = tokens_of(1, 30)
    state, close = model.init_state(1), 0
    for t in range(30):
        plan.write(0, state)
        found = plan.step(tokens[:, t].contiguous()).clone()
        expected, state = in_python(model, tokens[:, t : t + 1], state)
        close += int(torch.allclose(found, expected[:, 0], rtol=1e-4, atol=1e-4))
    assert close >= 27


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_row_is_the_same_alone_in_any_batch_and_with_threads(weights: str) -> None:
    """Also of a model of floats: every dot product has one order."""
    model = model_of(hidden_size=272, **({} if weights == "float" else {**INT8, **INT8_HEAD}))
    tokens = tokens_of(9, 5)
    alone = torch.cat([in_plan(DecodePlan(model, 1), tokens[row : row + 1]) for row in range(9)])
    for batch in (2, 3, 5, 9):
        for threads in (1, 2):
            plan = DecodePlan(model, batch, threads=threads)
            assert torch.equal(in_plan(plan, tokens[:batch]), alone[:batch])


def test_three_hundred_tokens() -> None:
    model = model_of(**INT8, **INT8_HEAD, neuron=NEURONS["adaptive"], num_hidden_layers=2)
    tokens = tokens_of(2, 300)
    expected, state = in_python(model, tokens)
    plan = DecodePlan(model, 2)
    assert torch.equal(in_plan(plan, tokens), expected)
    assert same_state(plan.read(1), row_of(state, 1))


def test_going_on_from_a_prefilled_state() -> None:
    model = model_of(**INT8, **INT8_HEAD, neuron=NEURONS["plif-gain"])
    tokens = tokens_of(2, 20)
    with torch.no_grad():
        whole, last = model(tokens)
        _, state = model(tokens[:, :13])
    plan = DecodePlan(model, 5)
    slots = torch.tensor([4, 1])
    for row, slot in enumerate(slots.tolist()):
        plan.write(slot, row_of(state, row))
    assert torch.equal(in_plan(plan, tokens[:, 13:], slots), whole[:, 13:])
    assert same_state(plan.read(4), row_of(last, 0))


def test_the_single_step_of_the_model_has_the_same_bits() -> None:
    """Tokens [B], the specification, under no_grad."""
    model = model_of(**INT8, **INT8_HEAD, neuron=NEURONS["adaptive"])
    tokens, state = tokens_of(2, STEPS), model.init_state(2)
    plan = DecodePlan(model, 2)
    with torch.no_grad():
        for t in range(STEPS):
            logits, state = model(tokens[:, t], state)
            assert torch.equal(logits, plan.step(tokens[:, t].contiguous()))
            assert same_state(plan.read(1), row_of(state, 1))
