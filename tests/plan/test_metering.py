"""A plan counts for a meter what the model's own steps report, and counts nothing without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm import state as states
from spikelm.codings.meter import CountMeter
from spikelm.decoding import DecodePlan
from spikelm.errors import KernelError
from spikelm.generation import generate
from spikelm.kernels.compile import compiler_command
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.sampling import Sampler
from spikelm.tokenizer import Tokenizer

from .models import INT8, INT8_HEAD, NEURONS, VOCABULARY, model_of
from .test_hybrids import build, preset

BYTES = Tokenizer.bytes()
LOW_CAP = {"name": "adaptive", "k": 3.0, "dead_zone": 0.5, "cap": 4}
"""Cuts off a few counts in a hundred."""


@pytest.fixture(autouse=True)
def _needs_c() -> None:
    """Where there is a compiler, C that does not compile is a failure."""
    try:
        compiler_command()
    except KernelError as error:
        pytest.skip(f"no C kernels: {error}")


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def metered_alike(model: SpikeLM, rows: int = 3, length: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summaries of the same steps: the model's meter, and the one that a plan tells.

    Every step begins with the model's state, so that a spike that rounding moves is not the first of many.
    """
    plan, tokens = DecodePlan(model, rows, max_len=length), tokens_of(rows, length)
    ours, theirs = Meter(), Meter()
    state = model.init_state(rows, max_len=length)
    with plan.metered(ours):
        for t in range(length):
            for row in range(rows):
                plan.write(row, states.select_rows(state, torch.tensor([row])))
            plan.step(tokens[:, t].contiguous())
            state = model(tokens[:, t : t + 1], state, Context(meter=theirs))[1]
    return theirs.summary(), ours.summary()


INTEGER: dict[str, dict[str, Any]] = {
    **{name: {**INT8, **INT8_HEAD, "neuron": spec} for name, spec in NEURONS.items() if name != "none"},
    "low-cap": {**INT8, "neuron": LOW_CAP, **INT8_HEAD, "head_neuron": LOW_CAP},
    "binary-embedding": {
        **INT8,
        **INT8_HEAD,
        "neuron": LOW_CAP,
        "embedding_neuron": {"name": "heaviside"},
    },
}


@pytest.mark.parametrize("name", INTEGER)
def test_integer_models_give_the_same_figures(name: str) -> None:
    model = model_of(**INTEGER[name])
    wanted, found = metered_alike(model)
    assert found == wanted
    assert len(found["projections"]) == 22 and found["total"]["spiking_share"] == 1.0
    if name == "low-cap":
        assert 0 < found["projections"]["head"]["clipped"] < found["projections"]["head"]["at_cap"] < 0.5
    if name == "binary-embedding":
        assert 0 < found["neurons"]["embedding_neuron"]["firing_rate"] < 1


def _quantised_moe() -> SpikeLM:
    """A mixture of experts in which everything is exact."""
    moe = {"name": "moe", "experts": 6, "top_k": 2, "shared": 1, "hidden": 24}
    return model_of(
        **{**INT8, **INT8_HEAD, "neuron": LOW_CAP},
        layers=[{"mixer": {"name": "wkv4"}, "channel": moe}],
        num_hidden_layers=2,
    )


def test_an_expert_counts_the_rows_that_chose_it() -> None:
    wanted, found = metered_alike(_quantised_moe(), rows=2, length=4)
    assert found == wanted
    tokens = {entry["tokens"] for path, entry in found["projections"].items() if ".experts." in path}
    assert len(tokens) > 1


def close(wanted: dict[str, Any], found: dict[str, Any], moved: int) -> None:
    """The same entries; of all values of a projection at most ``moved`` fell to another side."""
    assert found.keys() == wanted.keys()
    for group in ("projections", "neurons"):
        assert found[group].keys() == wanted[group].keys()
        for path, entry in wanted[group].items():
            width = entry.get("in_features", entry.get("features"))
            inputs = entry["tokens"] * width
            for figure, value in entry.items():
                if not isinstance(value, float):
                    assert found[group][path][figure] == value, (path, figure)
                    continue
                of = width if figure == "never_fired" else inputs
                if figure == "mean_count" and group == "projections" and not entry["spiking"]:
                    assert found[group][path][figure] == pytest.approx(value, rel=1e-4), path
                    continue
                assert found[group][path][figure] == pytest.approx(value, abs=1.01 * moved / of), (
                    path,
                    figure,
                )
    assert found["total"] == pytest.approx(wanted["total"], rel=0.02)


FLOAT: dict[str, dict[str, Any]] = {
    "adaptive": {"neuron": LOW_CAP},
    "uncapped": {"neuron": NEURONS["adaptive-uncapped"]},
    "plif": {"neuron": NEURONS["plif-gain"]},
    "none": {"neuron": NEURONS["none"]},
    "int8-none": {"neuron": NEURONS["none"], **INT8},
    "after": {"neuron": NEURONS["lif"], "placement": "after"},
    "after-adaptive": {"neuron": LOW_CAP, "placement": "after"},
}


@pytest.mark.parametrize("name", FLOAT)
def test_float_models_give_the_same_figures(name: str) -> None:
    """Sums of floats have another order, and a value at its threshold may fall to the other side."""
    wanted, found = metered_alike(model_of(**FLOAT[name]))
    close(wanted, found, moved=3)
    assert bool(found["neurons"]) == name.startswith("after")


@pytest.mark.parametrize("name", ["spikingbrain-nano", "spikformer-lm-nano", "spike-driven-lm-nano"])
def test_other_architectures_too(name: str) -> None:
    """(Spiking attention has neurons between its projections.)"""
    wanted, found = metered_alike(build(preset(name)), rows=2)
    close(wanted, found, moved=3)


# --- generation ---------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every step that a plan runs during the test."""
    found: list[int] = []
    step = DecodePlan.step

    def counted(self: DecodePlan, tokens: Tensor, slots: Tensor | None = None) -> Tensor:
        found.append(tokens.shape[0])
        return step(self, tokens, slots)

    monkeypatch.setattr(DecodePlan, "step", counted)
    yield found


def byte_model(**options: Any) -> SpikeLM:
    return model_of(vocab_size=256, **{**INT8, **INT8_HEAD, "neuron": LOW_CAP, **options})


def written(model: SpikeLM, meter: Meter, **options: Any) -> list[int]:
    pieces = generate(model, BYTES, "The ", 20, Sampler(seed=3), ctx=Context(meter=meter), **options)
    return [piece.token for piece in pieces]


def test_a_metered_text_uses_the_plan_and_gives_the_models_figures(steps: list[int]) -> None:
    model, ours, theirs = byte_model(), Meter(), Meter()
    text = written(model, ours)
    assert steps == [1] * 19
    assert written(model, theirs, planned=False) == text and len(steps) == 19
    assert ours.summary() == theirs.summary()
    assert ours.summary()["projections"]["blocks.0.mixer.key"]["tokens"] == 4 + 19
    again = Meter()  # the plan that is kept begins anew
    written(model, again)
    assert again.summary() == theirs.summary() and len(steps) == 38


def test_one_meter_may_see_several_texts(steps: list[int]) -> None:
    model, ours, theirs = byte_model(), Meter(), Meter()
    for _ in range(2):
        written(model, ours)
        written(model, theirs, planned=False)
    assert ours.summary() == theirs.summary() and len(steps) == 38


def test_a_text_that_is_left_early_is_counted_so_far(steps: list[int]) -> None:
    meter = Meter()
    pieces = generate(byte_model(), BYTES, "The ", 50, Sampler(seed=3), ctx=Context(meter=meter))
    for _ in range(6):
        next(pieces)
    pieces.close()
    assert steps == [1] * 5
    assert meter.summary()["projections"]["head"]["tokens"] == 1 + 5


@pytest.mark.parametrize("meter", [Meter(raster=["head"]), CountMeter()], ids=["raster", "histograms"])
def test_what_needs_every_count_is_left_to_the_model(meter: Meter, steps: list[int]) -> None:
    text = written(byte_model(), meter)
    assert not steps
    assert meter.summary()["projections"]["head"]["tokens"] == len(text) == 20
    if meter.raster:
        assert sum(part.shape[1] for part in meter.rasters["head"]) == 20


def test_nothing_is_counted_without_a_meter() -> None:
    plan = DecodePlan(byte_model(), 1)
    with plan.metered(None):
        plan.step(torch.tensor([1]))
    meter = Meter()
    with plan.metered(meter):
        pass
    plan.step(torch.tensor([1]))
    assert not meter.counts
    assert not any(seen.numbers.any() or seen.fired.any() for seen in plan._observations)


def test_an_error_inside_keeps_what_was_counted() -> None:
    plan, meter = DecodePlan(byte_model(), 1), Meter()
    with pytest.raises(KeyboardInterrupt), plan.metered(meter):
        plan.step(torch.tensor([1]))
        raise KeyboardInterrupt
    assert meter.summary()["projections"]["head"]["tokens"] == 1
