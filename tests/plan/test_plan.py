"""What a decode plan does besides arithmetic: slots, states, statistics, refusals, what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spikelm import state as states
from spikelm.decoding import DecodePlan
from spikelm.errors import KernelError, PlanError, StateError
from spikelm.kernels.compile import compiler_command
from spikelm.kernels.plan.builder import Builder
from spikelm.kernels.plan.records import ops
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.recurrence import Context, Part

from .models import INT8, INT8_HEAD, NEURONS, VOCABULARY, in_plan, in_python, model_of, same_state, tokens_of


@pytest.fixture(autouse=True)
def _needs_c() -> None:
    """Where there is a compiler, C that does not compile is a failure."""
    try:
        compiler_command()
    except KernelError as error:
        pytest.skip(f"no C kernels: {error}")


@pytest.fixture(scope="module")
def integer() -> SpikeLM:
    return model_of(**INT8, **INT8_HEAD, neuron=NEURONS["adaptive"])


# --- slots and states ---------------------------------------------


def test_slots_in_any_order_and_rows_that_are_left_out(integer: SpikeLM) -> None:
    tokens = tokens_of(3, 6)
    expected, _ = in_python(integer, tokens)
    plan = DecodePlan(integer, 4)
    untouched = plan.read(1)
    batch = torch.stack([tokens[2], torch.full((6,), 7), tokens[0], torch.full((6,), -5), tokens[1]])
    slots = torch.tensor([3, -1, 0, -9, 2])
    found = in_plan(plan, batch, slots)
    assert torch.equal(found[[2, 4, 0]], expected)
    assert not found[[1, 3]].any()
    assert same_state(plan.read(1), untouched)


def test_more_left_out_rows_than_slots(integer: SpikeLM) -> None:
    plan = DecodePlan(integer, 1)
    expected = plan.step(torch.tensor([5])).clone()
    plan.reset(0)
    slots = torch.full((40,), -1)
    slots[17] = 0
    found = plan.step(torch.full((40,), 5), slots)
    assert torch.equal(found[17:18], expected) and not found[:17].any() and not found[18:].any()
    assert not plan.step(torch.full((3,), 5), torch.full((3,), -1)).any()


def test_write_read_and_reset(integer: SpikeLM) -> None:
    plan = DecodePlan(integer, 2)
    first = in_plan(plan, tokens_of(2, 5))
    kept = plan.read(1)
    assert states.flatten(kept).keys() == states.flatten(integer.init_state(1)).keys()
    after = in_plan(plan, tokens_of(2, 3, seed=1))
    plan.write(0, kept)
    assert torch.equal(in_plan(plan, tokens_of(2, 3, seed=1)[1:], torch.tensor([0])), after[1:])
    plan.reset(0)
    assert same_state(plan.read(0), integer.init_state(1))
    plan.reset(1)
    assert torch.equal(in_plan(plan, tokens_of(2, 5)), first)
    plan.step(torch.tensor([1, 2]))  # what was read is a copy
    assert not same_state(kept, plan.read(1))


def test_nothing_is_remembered_outside_the_pool(integer: SpikeLM) -> None:
    """The pool's bytes put back, with other work in between, the same logits come again."""
    plan = DecodePlan(integer, 2)
    in_plan(plan, tokens_of(2, 4))
    bytes_before = plan.pool.clone()
    first = in_plan(plan, tokens_of(2, 4, seed=1))
    in_plan(plan, tokens_of(2, 9, seed=2))
    plan.pool.copy_(bytes_before)
    plan._workspace.fill_(float("nan"))
    plan._scratch.fill_(255)
    assert torch.equal(in_plan(plan, tokens_of(2, 4, seed=1)), first)


def test_a_state_that_does_not_fit_is_refused(integer: SpikeLM) -> None:
    plan = DecodePlan(integer, 1)
    with pytest.raises(StateError, match="does not fit"):
        plan.write(0, {"nothing": torch.zeros(1, 3)})
    with pytest.raises(StateError, match="the model expects"):
        plan.write(0, integer.init_state(2))


# --- statistics ---------------------------------------------


@pytest.mark.parametrize("name", ["adaptive", "lif", "none"])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_statistics_are_those_of_the_meter(weights: str, name: str) -> None:
    if weights == "int8" and name == "none":
        options: dict[str, Any] = dict(INT8)
    else:
        options = {**INT8, **INT8_HEAD} if weights == "int8" else {}
    model = model_of(**options, neuron=NEURONS[name])
    tokens, meter = tokens_of(3, 6), Meter()
    plan = DecodePlan(model, 3)
    state = model.init_state(3)
    with torch.no_grad():
        for t in range(6):
            before, state = state, model(tokens[:, t : t + 1], state, Context(meter=meter))[1]
            for row in range(3):
                plan.write(row, states.select_rows(before, torch.tensor([row])))
            plan.step(tokens[:, t].contiguous())
    found = plan.statistics()
    assert found.keys() == meter.counts.keys()
    for path, entry in found.items():
        counted = meter.counts[path]
        inputs = 18 * counted.in_features
        assert entry["calls"] == 18 and entry["in_features"] == counted.in_features
        if weights == "int8" and name != "none":
            assert entry["silent"] == inputs - int(counted.nonzero)
            assert entry["magnitude"] == int(counted.magnitude)
        elif path.endswith("mixer.key"):  # further in, rounding may move a spike
            assert abs(entry["silent"] - (inputs - int(counted.nonzero))) <= 1
        width = 1 if weights == "int8" and path != "head" or (weights == "int8" and name != "none") else 4
        assert entry["bytes"] == 6 * counted.in_features * counted.out_features * width
    plan.clear_statistics()
    assert not any(entry["calls"] for entry in plan.statistics().values())


# --- weights ---------------------------------------------


def test_parameters_stay_ordinary_and_can_be_trained() -> None:
    model = model_of(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = {name: id(value) for name, value in model.named_parameters()}
    with torch.inference_mode():
        plan = DecodePlan(model, 1)
        plan.step(torch.tensor([1]))
    assert not plan.stale(model)
    assert ids == {name: id(value) for name, value in model.named_parameters()}
    assert model.head is not None and model.head.linear.weight is model.embedding.weight
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        logits, _ = model.train()(tokens_of(2, 9))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_of(2, 9)[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert plan.stale(model)
    twin = copy.deepcopy(model.eval())
    expected, _ = in_python(model, tokens_of(1, 4))
    torch.testing.assert_close(in_plan(DecodePlan(twin, 1), tokens_of(1, 4)), expected, rtol=1e-5, atol=2e-5)


def test_what_shares_its_memory_is_not_moved() -> None:
    """A flat buffer that belongs to somebody else goes on holding the parameters."""
    model = model_of()
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    at = 0
    for parameter in parameters:
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    expected, _ = in_python(model, tokens_of(1, 3))
    plan = DecodePlan(model, 1)
    torch.testing.assert_close(in_plan(plan, tokens_of(1, 3)), expected, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        flat.zero_()
    assert not any(parameter.any() for parameter in parameters)


def test_parameters_are_moved_once_and_saved_apart(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = model_of()
    DecodePlan(model, 1)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    DecodePlan(model, 2)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(place % 64 == 0 for place in places)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


# --- what is refused ---------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "slots", "sentence"),
    [
        ([0, VOCABULARY], None, f"row 1 has token {VOCABULARY}; expected ids from 0 to {VOCABULARY - 1}"),
        ([-1], None, "row 0 has token -1; expected ids from 0"),
        ([1, 2], [0, 3], "row 1 has slot 3; the plan has slots 0 to 2"),
        ([1, 2, 3], [1, 0, 1], "row 2 has slot 1, which an earlier row of the batch has too"),
        ([1, 2, 3, 4], None, "4 rows for a plan of 3 slots"),
        ([1, 2], [0], "1 slots for 2 tokens"),
    ],
)
def test_bad_calls_are_one_sentence_and_change_nothing(
    integer: SpikeLM, tokens: list[int], slots: list[int] | None, sentence: str
) -> None:
    plan = DecodePlan(integer, 3)
    in_plan(plan, tokens_of(3, 2))
    before = plan.pool.clone()
    with pytest.raises(PlanError, match=sentence):
        plan.step(torch.tensor(tokens), None if slots is None else torch.tensor(slots))
    assert torch.equal(plan.pool, before)


def test_other_bad_calls(integer: SpikeLM) -> None:
    plan = DecodePlan(integer, 2)
    for tokens in (torch.tensor([[1, 2]]), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(PlanError, match=r"expected int64 \[B\] on the CPU"):
            plan.step(tokens)
    with pytest.raises(PlanError, match="not contiguous"):
        plan.step(torch.arange(4)[::2])
    with pytest.raises(PlanError, match="slots 0 to 1"):
        plan.read(2)
    for slots in (0, -1, True, 2.0):
        with pytest.raises(PlanError, match="at least 1"):
            DecodePlan(integer, slots)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="threads"):
        DecodePlan(integer, 1, threads=0)


def test_models_that_cannot_be_lowered_are_named() -> None:
    with pytest.raises(PlanError, match="torch.float64 on cpu"):
        DecodePlan(model_of().double(), 1)
    with pytest.raises(PlanError, match="dropout"):
        DecodePlan(model_of(dropout=0.1).train(), 1)
    DecodePlan(model_of(dropout=0.1), 1)
    hooked = model_of()
    hooked.get_submodule("blocks.1.mixer").register_forward_hook(lambda *_: None)
    with pytest.raises(PlanError, match=r"blocks.1.mixer has forward hooks"):
        DecodePlan(hooked, 1)
    adapted = model_of()
    projection = adapted.get_submodule("blocks.0.channel.key")

    class Adapter(nn.Linear):
        """What a fine-tuning library puts in place of the weights."""

    projection.linear = Adapter(40, 104, bias=False)
    with pytest.raises(PlanError, match=r"blocks.0.channel.key has Adapter weights"):
        DecodePlan(adapted, 1)

    class Foreign(Part):
        """A part of another package."""

    foreign = model_of()
    foreign.blocks[1].mixer = Foreign()
    foreign.blocks[1].mixer.path = "blocks.1.mixer"
    foreign.blocks[1].mixer.init_state = foreign.blocks[0].mixer.init_state  # type: ignore[method-assign]
    with pytest.raises(PlanError, match=r"blocks.1.mixer \(Foreign\) has no lower\(\)"):
        DecodePlan(foreign, 1)


def test_records_are_checked() -> None:
    plan = Builder()
    x = plan.register(4)
    with pytest.raises(PlanError, match="no op 'ad'"):
        plan.record("ad", x, x, x, 4)
    with pytest.raises(PlanError, match="12 operands"):
        plan.record("add", *[x] * 13)
    with pytest.raises(PlanError, match=r"float32 on the CPU, got torch.float64"):
        plan.record("scale", x, x, 4, p=(torch.ones(4, dtype=torch.float64),))


def test_every_op_has_a_number() -> None:
    assert len(ops()) == len(set(ops().values())) >= 20


def test_registers_do_not_overlap_while_they_live() -> None:
    plan = Builder()
    a, b = plan.register(20), plan.register(5)
    plan.record("add", a, a, b, 5)  # a and b live
    c = plan.add(b, b)
    d = plan.add(a, c)
    plan.record("output", d, 5)
    records, _, width = plan.finish()
    places = {"a": records[0].a[0], "b": records[0].a[2], "c": records[1].a[2], "d": records[2].a[2]}
    assert all(place % 16 == 0 for place in places.values())
    assert places["b"] >= places["a"] + 20 or places["a"] >= places["b"] + 5
    assert not places["a"] <= places["c"] < places["a"] + 20
    assert width == 32 + 16 + 16 + 32  # b's place is too small for d
