"""Calibration and search: what is kept is right, and what is chosen is best for its budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.evaluation.segments import Segment, disjoint
from spikelm.quantisation import calibration
from spikelm.quantisation.calibration import Sample, calibrate
from spikelm.quantisation.search import CAPS, Choice, Trial, allocate
from spikelm.quantisation.spiking import convertible
from spikelm.recurrence import Context


def windows(trained: SimpleNamespace, count: int, length: int = 24) -> list[Segment]:
    data = torch.tensor(list(trained.text.read_bytes()), dtype=torch.int32).numpy()
    return list(itertools.islice(disjoint([data], length), count))


def keep(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Callable[..., None]:
    def hook(_: object, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, object]) -> None:
        inputs.append(args[0].detach()[0])
        outputs.append(output[0])

    return hook


def test_calibration_keeps_inputs_and_gradients(trained: SimpleNamespace) -> None:
    """Rows are the inputs, and the Fisher diagonal is that of the loss, both without padding."""
    model = load_model(trained.twin)
    projections, kept = convertible(model)
    assert kept == {} and "head" not in projections and len(projections) == 14
    short = windows(trained, 2)
    short.append(Segment(document=0, first=1, inputs=short[0].inputs[:5], targets=short[0].targets[:5]))
    found = calibrate(model, projections, short, batch_size=2)
    path = "blocks.1.channel.value"
    assert found.keys() == projections.keys()
    assert found[path].tokens == 24 + 24 + 5 and found[path].rows.shape == (53, 128)

    inputs: list[torch.Tensor] = []
    squares = torch.zeros(32)
    module = projections[path]
    assert all(parameter.grad is None for parameter in model.parameters())
    for window in short:  # one after the other, without padding
        kept_outputs: list[torch.Tensor] = []
        hook = module.register_forward_hook(keep(inputs, kept_outputs))
        module.linear.weight.requires_grad_(True)
        logits, _ = model(torch.from_numpy(window.inputs).long()[None])
        targets = torch.from_numpy(window.targets).long()
        loss = torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept_outputs)
        squares += gradient[0].square().sum(0)
        hook.remove()
    torch.testing.assert_close(found[path].fisher, squares / 53, rtol=1e-3, atol=1e-8)
    rows = torch.cat(inputs)
    ordered = lambda x: x[x.double().sum(-1).argsort()]  # noqa: E731
    torch.testing.assert_close(ordered(found[path].rows), ordered(rows), rtol=1e-4, atol=1e-5)


def test_memory_is_bounded(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reservoir keeps as many rows as it may, of early and late tokens alike, and the same ones again."""
    monkeypatch.setattr(calibration, "ROWS", 100)
    model = load_model(trained.twin)
    projections, _ = convertible(model)
    found = calibrate(model, projections, windows(trained, 12))
    assert all(len(sample.rows) == 100 and sample.tokens == 12 * 24 for sample in found.values())
    again = calibrate(model, projections, windows(trained, 12))
    path = "blocks.0.mixer.key"
    assert torch.equal(found[path].rows, again[path].rows)

    reservoir = calibration._Reservoir("p", 200)
    for start in range(0, 2000, 50):
        reservoir.add(torch.arange(start, start + 50.0)[:, None])
    assert reservoir.rows is not None and len(reservoir.rows.unique()) == 200
    assert reservoir.rows.mean() == pytest.approx(1000, abs=150)


def test_one_choice_by_hand() -> None:
    torch.manual_seed(1)
    rows, weight = torch.randn(30, 16), torch.randn(8, 16)
    rows[0, 0] = 50.0
    fisher = torch.rand(8)
    trial = Trial(Sample(rows=rows, fisher=fisher, tokens=30), rows, weight, weight)
    choice = trial.choice(3.0, 15, 0.0)
    threshold = rows.abs().mean(-1, keepdim=True) / 3
    free = (rows / threshold).round()
    counts = free.clamp(-15, 15)
    delta = (counts * threshold - rows) @ weight.T
    outputs = rows @ weight.T
    assert choice.error == pytest.approx(float(delta.norm() / outputs.norm()), rel=1e-4)
    assert choice.penalty == pytest.approx(0.5 * float((delta.square().mean(0) * fisher).sum()), rel=1e-4)
    assert choice.clipped == pytest.approx(float((free.abs() > 15).float().mean()))
    bits = [bin(int(n)).count("1") for n in counts.abs().flatten()]
    assert choice.ones == pytest.approx(sum(bits) / len(bits))
    errors = [c.error for c in trial.candidates(3.0, 0.0)]
    assert errors[0] > errors[-1] and len(errors) == 13


def test_the_cap_shrinks_only_where_it_is_free() -> None:
    torch.manual_seed(2)
    even, weight = torch.rand(50, 64) + 0.5, torch.randn(8, 64)
    for rows, small in ((even, True), (torch.cat([even[:, :1] * 1000, even[:, 1:]], 1), False)):
        trial = Trial(Sample(rows=rows, fisher=torch.ones(8), tokens=50), rows, weight, weight)
        choice = trial.choice(3.0, CAPS[-1], 0.0)
        capped = trial.capped(choice)
        assert (capped.cap < CAPS[-1]) == small
        assert capped.error**2 <= 1.01 * choice.error**2


def test_allocation_is_best_for_its_budget() -> None:
    """No other combination within the cost it reaches has a smaller penalty (all of them are tried)."""

    def option(k: float, penalty: float, cost: float) -> Choice:
        return Choice(
            k=k, cap=127, dead_zone=0.0, error=0.1, penalty=penalty, ones=cost, clipped=0.0, beyond=0.0
        )

    generator = torch.Generator().manual_seed(4)
    sizes = {"a": 10, "b": 40, "c": 7, "d": 21}
    steepness = torch.rand(4, generator=generator).tolist()
    options = {
        path: [option(k, s / k**2, 0.5 + 0.3 * k) for k in (1.0, 1.5, 2.0, 3.0, 4.5)]
        for path, s in zip(sizes, steepness, strict=True)
    }
    everywhere = sum(sizes[path] * found[2].ones for path, found in options.items())
    for budget in (everywhere, 1.2 * everywhere, 0.9 * everywhere):
        chosen = allocate(options, sizes, budget)
        cost = sum(sizes[path] * choice.ones for path, choice in chosen.items())
        assert cost <= budget
        penalty = sum(choice.penalty for choice in chosen.values())
        for other in itertools.product(*options.values()):
            if sum(sizes[path] * c.ones for path, c in zip(sizes, other, strict=True)) <= cost:
                assert penalty <= sum(c.penalty for c in other) + 1e-12
    assert all(c.k == 4.5 for c in allocate(options, sizes, 1e9).values())
    assert all(c.k == 1.0 for c in allocate(options, sizes, 0.0).values())
    uniform = sum(found[2].penalty for found in options.values())
    best = sum(c.penalty for c in allocate(options, sizes, everywhere).values())
    assert best < uniform


def test_context_reaches_the_hooks(trained: SimpleNamespace) -> None:
    """The hooks see the context as a third argument; a keyword works, too."""
    model = load_model(trained.twin)
    projections, _ = convertible(model)
    path, module = next(iter(projections.items()))
    reservoir = calibration._Reservoir(path, 10)
    handle = module.register_forward_hook(calibration._observe(reservoir), with_kwargs=True)
    valid = torch.tensor([[True, False, True]])
    with torch.no_grad():
        module(torch.randn(1, 3, 32), None, ctx=Context(valid=valid))
        module(torch.randn(1, 3, 32))
    handle.remove()
    assert reservoir.tokens == 5
