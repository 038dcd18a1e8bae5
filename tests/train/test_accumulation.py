"""A step computed in pieces is the step: samples, gradients, losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.data import TokenBlocks
from spikelm.loss import next_token_loss
from spikelm.recurrence import Context
from spikelm.tokenizer import Tokenizer
from spikelm.train.backend_torch import TorchBackend
from spikelm.train.batches import micro_batches, pieces
from spikelm.train.config import TrainConfig
from spikelm.train.setup import build_model
from spikelm.train.trainer import Trainer

TWIN = {"model__neuron": {"name": "none"}}


def blocks() -> TokenBlocks:
    """Documents without separator: targets between them do not count, so pieces weigh differently."""
    documents = ["spike " * n for n in (1, 30, 2, 3, 60, 1, 1, 1, 40)]
    return TokenBlocks.from_documents(documents, Tokenizer.bytes(), 16)


@pytest.mark.parametrize(("samples", "parts"), [(8, 1), (8, 2), (8, 3), (7, 7), (64, 5)])
def test_pieces_cover_the_samples(samples: int, parts: int) -> None:
    found = list(pieces(5, samples, parts))
    assert [i for start, n in found for i in range(start, start + n)] == list(range(5, 5 + samples))
    assert max(n for _, n in found) - min(n for _, n in found) <= 1


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-2])
def test_gradients_are_those_of_the_large_batch(make_values: Any, parts: int, l2wrap: float) -> None:
    found = []
    for number in (1, parts):
        config = TrainConfig.from_dict(make_values(batch_size=7, accumulation=number, l2wrap=l2wrap, **TWIN))
        model = build_model(config, Tokenizer.bytes()).double()
        for parameter in model.parameters():
            parameter.data.add_(0.1)
        model.train()
        backend = TorchBackend(model, config, torch.device("cpu"))
        batches = micro_batches(blocks(), 0, 3, 7, number)
        counts = [batch.count for batch in batches]
        assert sum(counts) < 7 * 16
        for index, batch in enumerate(batches):
            ctx = Context(reset=batch.reset, random=batch.random(0), losses=[])
            output = backend.loss(batch.inputs, batch.targets, None, ctx)
            backend.backward(output.loss * (batch.count / sum(counts)), last=index == number - 1)
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert len(set(counts)) > 1  # otherwise a plain mean of pieces would pass too
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_runs_agree(make_values: Any, tmp_path: Path, optim: str) -> None:
    losses = []
    for number in (1, 3):
        values = make_values(
            accumulation=number, batch_size=6, out=str(tmp_path / f"{optim}{number}"), **TWIN
        )
        trainer = Trainer(TrainConfig.from_dict({**values, "optim": {"name": optim, "lr": 1e-3}}))
        trainer.run()
        losses.append([line["loss"] for line in trainer.log.read("step")])
    tolerance = 1e-5 if optim == "adamw" else 1e-3  # Muon orthogonalises in bf16
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_runs_agree_where_pieces_weigh_differently(make_values: Any, tmp_path: Path) -> None:
    """Short documents without separator: the targets between them do not count."""
    documents = ["spike " * (1 + 37 * i % 11 * (i % 3)) for i in range(60)]
    text = "\n".join(json.dumps({"text": document}) for document in documents)
    (tmp_path / "train.jsonl").write_text(text)
    found = []
    for number in (1, 3):
        values = make_values(
            accumulation=number, batch_size=6, log_every=1, out=str(tmp_path / f"{number}"), **TWIN
        )
        values["data"]["train"] = str(tmp_path / "train.jsonl") + "#text"
        trainer = Trainer(TrainConfig.from_dict(values))
        batches = micro_batches(trainer._text.train, 0, 0, 6, 3)
        assert len({batch.count for batch in batches}) > 1
        trainer.run()
        found.append([(line["loss"], line["grad_norm"]) for line in trainer.log.read("step")])
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_l2wrap_of_the_configuration_is_used(make_values: Any) -> None:
    gradients = {}
    for factor in (0.0, 1e-2):
        config = TrainConfig.from_dict(make_values(l2wrap=factor, **TWIN))
        model = build_model(config, Tokenizer.bytes())
        for parameter in model.parameters():  # the head starts at zero, where there is nothing to pull
            parameter.data.add_(0.1)
        batch = micro_batches(blocks(), 0, 0, 4, 1)[0]
        backend = TorchBackend(model, config, torch.device("cpu"))
        backend.backward(backend.loss(batch.inputs, batch.targets, None, Context()).loss, last=True)
        got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        backend.clear_gradients()
        next_token_loss(model, batch.inputs, batch.targets, l2wrap=factor).loss.backward()
        assert all(torch.equal(p.grad, got[name]) for name, p in model.named_parameters() if name in got)
        gradients[factor] = got["head.linear.weight"]
    assert not torch.allclose(gradients[0.0], gradients[1e-2], rtol=1e-3)


@pytest.mark.parametrize("batches", [0, 2])
def test_evaluation_does_not_depend_on_accumulation(make_values: Any, tmp_path: Path, batches: int) -> None:
    found = []
    for number in (1, 3, 5):
        values = make_values(
            batch_size=5, accumulation=number, eval_batches=batches, steps=1, out=str(tmp_path / f"{number}")
        )
        trainer = Trainer(TrainConfig.from_dict({**values, "schedule": {"warmup": 0}}))
        blocks = trainer._text.valid
        assert blocks is not None and len(blocks) > 10
        evaluation = trainer.run().evaluation
        assert evaluation is not None
        assert evaluation.tokens == 16 * (len(blocks) if batches == 0 else 5 * batches)
        found.append((evaluation.loss, evaluation.spike_rate))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(make_values: Any, tmp_path: Path) -> None:
    weights = []
    for chosen in (False, True):
        values = make_values(gradient_checkpointing=chosen, steps=4, out=str(tmp_path / f"run{chosen}"))
        trainer = Trainer(TrainConfig.from_dict(values))
        trainer.run()
        weights.append(trainer.model.state_dict())
        assert trainer.log.read("step")[-1]["aux_loss"] > 0.0
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_matrix_products_have_the_precision_of_the_run(
    make_values: Any, precision: str, dtype: torch.dtype
) -> None:
    """In training steps and in evaluations."""
    trainer = Trainer(TrainConfig.from_dict(make_values(precision=precision, steps=2)))
    seen = set()
    for name, module in trainer.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.add((name, module.training, output.dtype))
            )
    trainer.run()
    assert {training for _, training, _ in seen} == {True, False}
    assert {found for _, _, found in seen} == {dtype}


def test_bf16_keeps_master_weights_and_state_in_fp32(make_values: Any) -> None:
    config = TrainConfig.from_dict(make_values(precision="bf16", steps=3))
    trainer = Trainer(config)
    result = trainer.run()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert result.evaluation is not None and result.evaluation.bits_per_byte < 9.0
    backend = TorchBackend(trainer.model, config, torch.device("cpu"))
    batch = micro_batches(blocks(), 0, 0, 2, 1)[0]
    output = backend.loss(batch.inputs, batch.targets, None, Context())
    from spikelm.state import flatten

    assert {value.dtype for value in flatten(output.state).values()} == {torch.float32}
