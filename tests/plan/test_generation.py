"""Generation with a plan: the same text, when it is used and when not, plans that are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spikelm import plan_cache
from spikelm.decoding import DecodePlan
from spikelm.errors import KernelError
from spikelm.generation import Piece, generate
from spikelm.kernels.compile import compiler_command
from spikelm.kernels.dispatch import use_backend
from spikelm.model import SpikeLM
from spikelm.sampling import Sampler
from spikelm.tokenizer import Tokenizer

from .models import INT8, INT8_HEAD, NEURONS, model_of

BYTES = Tokenizer.bytes()


@pytest.fixture(autouse=True)
def _needs_c() -> None:
    """Where there is a compiler, C that does not compile is a failure."""
    try:
        compiler_command()
    except KernelError as error:
        pytest.skip(f"no C kernels: {error}")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DecodePlan]]:
    """The plans that are built during the test, with the number of their steps."""
    found: list[DecodePlan] = []
    build, step = DecodePlan.__init__, DecodePlan.step

    def counted_build(self: DecodePlan, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        self.steps = 0  # type: ignore[attr-defined]
        found.append(self)

    def counted_step(self: DecodePlan, *args: Any, **options: Any) -> Any:
        self.steps += 1  # type: ignore[attr-defined]
        return step(self, *args, **options)

    monkeypatch.setattr(DecodePlan, "__init__", counted_build)
    monkeypatch.setattr(DecodePlan, "step", counted_step)
    yield found


def model(**options: Any) -> SpikeLM:
    return model_of(vocab_size=256, **{**INT8, **INT8_HEAD, "neuron": NEURONS["adaptive"], **options})


def run(model: SpikeLM, tokens: int = 24, prompt: str = "The ", **options: Any) -> list[Piece]:
    return list(generate(model, BYTES, prompt, tokens, Sampler(seed=3), **options))


def test_the_text_and_its_probabilities_are_those_of_the_model(built: list[DecodePlan]) -> None:
    ours = model()
    pieces = run(ours)
    assert [plan.steps for plan in built] == [23]  # type: ignore[attr-defined]
    with use_backend("c"):
        assert run(ours) == pieces
    python = run(ours, planned=False)
    assert len(built) == 1 and built[0].steps == 46  # type: ignore[attr-defined]
    assert python == pieces
    assert len({piece.token for piece in pieces}) > 8


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_an_explicit_choice_is_respected(built: list[DecodePlan], name: str) -> None:
    with use_backend(name):
        assert len(run(model(), tokens=3)) == 3
    assert not built


def test_one_plan_serves_one_text_after_the_other(built: list[DecodePlan]) -> None:
    ours = model()
    first = run(ours)
    assert run(ours) == first and len(built) == 1
    assert run(ours, prompt="Another") != first and len(built) == 1


def test_texts_written_in_turns_do_not_mix(built: list[DecodePlan]) -> None:
    ours = model()
    expected = [run(ours, prompt=prompt) for prompt in ("One", "Two")]
    iterators = [generate(ours, BYTES, prompt, 24, Sampler(seed=3)) for prompt in ("One", "Two")]
    found: list[list[Piece]] = [[], []]
    for _ in range(24):
        for pieces, iterator in zip(found, iterators, strict=True):
            pieces.append(next(iterator))
    assert found == expected
    assert len(built) == 2


def test_a_closed_iterator_gives_its_plan_back(built: list[DecodePlan]) -> None:
    ours = model()
    iterator = generate(ours, BYTES, "x", 50, Sampler(seed=3))
    for _ in range(3):
        next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    run(ours)
    assert len(built) == 1


def test_changed_weights_give_a_new_plan(built: list[DecodePlan]) -> None:
    ours = model(neuron=NEURONS["plif-gain"])  # the plan holds exp(log gain)
    before = run(ours)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "log_gain" in name:
                parameter.add_(1.0)
    after = run(ours)
    assert len(built) == 2 and after != before
    assert after == run(ours, planned=False)
    ours.load_state_dict(model(neuron=NEURONS["plif-gain"]).state_dict())
    assert run(ours) == before
    assert len(built) == 3


def test_the_first_token_does_not_wait(built: list[DecodePlan]) -> None:
    iterator = generate(model(), BYTES, "The ", 5, Sampler(seed=3))
    next(iterator)
    assert not built
    next(iterator)
    assert len(built) == 1
    assert len(run(model(), tokens=1)) == 1
    assert len(built) == 1


def test_a_model_in_training_is_left_alone(built: list[DecodePlan]) -> None:
    ours = model_of(vocab_size=256).train()
    places = [parameter.data_ptr() for parameter in ours.parameters()]
    run(ours, tokens=4)
    assert ours.training and not built
    assert places == [parameter.data_ptr() for parameter in ours.parameters()]


def test_a_refusal_is_logged_once(built: list[DecodePlan], caplog: pytest.LogCaptureFixture) -> None:
    ours = model_of(vocab_size=256)
    ours.get_submodule("blocks.0.mixer").register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, plan_cache.__name__):
        assert len(run(ours, tokens=4)) == len(run(ours, tokens=4)) == 4
    (line,) = caplog.messages
    assert line.startswith("decoding step by step in Python: blocks.0.mixer has forward hooks")
    assert not built


def test_without_a_compiler_the_python_step_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(model())
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO, plan_cache.__name__):
        found = run(model())
    assert any("decode plans are C: CC='no-such-compiler'" in line for line in caplog.messages)
    assert len(found) == len(expected)
    with torch.no_grad():  # the torch forms: close, not the same bits
        tokens = torch.tensor([[1, 2, 3]])
        without = model()(tokens)[0]
    monkeypatch.delenv("CC")
    with torch.no_grad():
        assert torch.allclose(model()(tokens)[0], without, atol=1.0)
