"""Groups, what each optimiser does to them, and the one step function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spikelm.config import ModelConfig
from spikelm.errors import TrainingError
from spikelm.model import SpikeLM
from spikelm.train.config import OptimConfig
from spikelm.train.optim import (
    build_optimizers,
    load_optimizer_tensors,
    optimizer_step,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)


def model(**options: Any) -> SpikeLM:
    torch.manual_seed(0)
    return SpikeLM(ModelConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, **options))


def named(built: SpikeLM) -> list[tuple[str, nn.Parameter]]:
    return list(built.named_parameters())


def fill_gradients(built: SpikeLM, scale: float = 1.0) -> None:
    torch.manual_seed(5)
    for _, parameter in named(built):
        parameter.grad = scale * torch.randn_like(parameter)


def test_groups_hold_every_parameter_once() -> None:
    built = model(neuron={"name": "plif"})
    groups = parameter_groups(built)
    names = [
        name for part in (groups.hidden, groups.matrices, groups.vectors, groups.neurons) for name, _ in part
    ]
    assert sorted(names) == sorted(name for name, _ in named(built))
    assert {name for name, _ in groups.neurons} == built.fp32_parameters()
    assert any("tau" in name or "neuron" in name for name, _ in groups.neurons)
    assert any(name.endswith("time_decay") for name, _ in groups.neurons)
    assert {name for name, _ in groups.matrices} == {"embedding.weight", "head.linear.weight"}
    assert all(p.dim() == 2 and name.endswith("linear.weight") for name, p in groups.hidden)
    assert len(groups.hidden) == 2 * 7
    assert all("norm" in name or "mix_" in name or "bias" in name for name, _ in groups.vectors)


def test_tied_embedding_is_no_hidden_matrix() -> None:
    groups = parameter_groups(model(tie_word_embeddings=True))
    assert [name for name, _ in groups.matrices] == ["embedding.weight"]


def test_hidden_size_equal_to_the_vocabulary_confuses_nothing() -> None:
    torch.manual_seed(0)
    groups = parameter_groups(SpikeLM(ModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)))
    assert len(groups.hidden) == 7


def test_frozen_parameters_are_left_out() -> None:
    built = model()
    built.embedding.weight.requires_grad_(False)
    assert not any(name == "embedding.weight" for name, _ in parameter_groups(built).matrices)


def test_low_precision_master_weights_are_refused() -> None:
    with pytest.raises(TrainingError, match="float32 master weights"):
        parameter_groups(model().bfloat16())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_shrinks_matrices_only(name: str) -> None:
    built = model(neuron={"name": "plif"})
    with torch.no_grad():
        for _, parameter in named(built):
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizers = build_optimizers(built, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    assert optimizer_step(named(built), optimizers, clip=0.0).applied
    groups = parameter_groups(built)
    for _, parameter in [*groups.hidden, *groups.matrices]:
        assert torch.allclose(parameter, torch.full_like(parameter, 0.95))
    for key, parameter in [*groups.vectors, *groups.neurons]:
        assert torch.equal(parameter, torch.ones_like(parameter)), key


def test_adam_as_published() -> None:
    (adam,) = build_optimizers(model(), OptimConfig(name="adam", lr=6e-4))
    assert type(adam) is torch.optim.Adam
    (group,) = adam.param_groups
    assert group["betas"] == (0.9, 0.99) and group["eps"] == 4e-9 and group["weight_decay"] == 0.0


def test_muon_takes_hidden_matrices_only() -> None:
    built = model()
    config = OptimConfig.model_validate(
        {"name": "muon", "lr": 0.1, "muon": {"lr": 0.02, "weight_decay": 0.0}}
    )
    muon, adamw = build_optimizers(built, config)
    assert type(muon) is torch.optim.Muon and type(adamw) is torch.optim.AdamW
    assert muon.param_groups[0]["names"] == [name for name, _ in parameter_groups(built).hidden]
    set_learning_rate([muon, adamw], 0.5)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.01)
    assert {group["lr"] for group in adamw.param_groups} == {0.05}


def test_clipping_scales_the_gradient() -> None:
    built = model()
    sgd = torch.optim.SGD(built.parameters(), lr=1.0)
    fill_gradients(built)
    before = {name: p.detach().clone() for name, p in named(built)}
    gradient = {name: p.grad.clone() for name, p in named(built) if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
    report = optimizer_step(named(built), [sgd], clip=1.0)
    assert report.applied and report.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, p in named(built):
        torch.testing.assert_close(p.detach(), before[name] - gradient[name] / norm)
        assert p.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad: float) -> None:
    built = model()
    optimizers = build_optimizers(built, OptimConfig())
    fill_gradients(built)
    assert optimizer_step(named(built), optimizers, clip=1.0).applied
    before = {name: p.detach().clone() for name, p in named(built)}
    memory = {name: value.clone() for name, value in optimizer_tensors(optimizers).items()}
    fill_gradients(built)
    weight = built.get_parameter("blocks.1.channel.key.linear.weight")
    assert weight.grad is not None
    weight.grad[0, 0] = bad
    report = optimizer_step(named(built), optimizers, clip=1.0)
    assert not report.applied and report.bad[0].parameters == ("blocks.1.channel.key.linear.weight",)
    assert all(torch.equal(p, before[name]) for name, p in named(built))
    assert all(torch.equal(value, memory[name]) for name, value in optimizer_tensors(optimizers).items())


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_state_round_trip_is_exact(name: str) -> None:
    first, second = model(), model()
    ours, theirs = (build_optimizers(m, OptimConfig(name=name, lr=0.01)) for m in (first, second))
    for _ in range(3):
        fill_gradients(first)
        optimizer_step(named(first), ours, clip=1.0)
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(theirs, {key: value.clone() for key, value in optimizer_tensors(ours).items()})
    for built, optimizers in ((first, ours), (second, theirs)):
        fill_gradients(built, 0.3)
        optimizer_step(named(built), optimizers, clip=1.0)
    for (key, a), (_, b) in zip(named(first), named(second), strict=True):
        assert torch.equal(a, b), key


def test_foreign_state_is_refused() -> None:
    optimizers = build_optimizers(model(), OptimConfig())
    with pytest.raises(TrainingError, match="belongs to no parameter"):
        load_optimizer_tensors(optimizers, {"0/nobody/exp_avg": torch.zeros(2)})
    with pytest.raises(TrainingError, match=r"has shape \(2,\)"):
        load_optimizer_tensors(optimizers, {"0/embedding.weight/exp_avg": torch.zeros(2)})
