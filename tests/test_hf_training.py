"""Training through the transformers wrapper: losses, accumulation, schedules, dropout, packed documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from spikelm.errors import ConfigError
from spikelm.hf import (
    SpikeLMConfig,
    SpikeLMForCausalLM,
    SpikeLMForSequenceClassification,
    StepCallback,
)
from spikelm.recurrence import Context

from . import wrapped
from .wrapped import SMALL, tokens


def neuron(**rate_target: float) -> dict[str, object]:
    extra = {"rate_target": {"target": 0.1, "weight": 3.0, **rate_target}} if rate_target else {}
    return {"name": "adaptive", "k": 3.0, "dead_zone": 1.0, **extra}


def small(**values: object) -> SpikeLMForCausalLM:
    return wrapped.small(**values).train()


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of one repeated pattern; ``masked`` rows have few labels that count."""

    def __init__(self, lengths: tuple[int, ...] = (20,)) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(20) * 3 + index) % 23
        counted = torch.arange(20) < self.lengths[index % len(self.lengths)]
        return {"input_ids": row, "labels": torch.where(counted, row, -100)}


def trainer(model: nn.Module, folder: Path, rows: Rows | None = None, **options: object) -> Trainer:
    arguments: dict[str, object] = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    made = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=1, **{**arguments, **options},
    )  # fmt: skip
    return Trainer(model=model, args=made, train_dataset=rows or Rows())


def aux_of(model: SpikeLMForCausalLM, ids: Tensor, step: int = 0) -> Tensor:
    losses: list[Tensor] = []
    model.model(ids, None, Context(losses=losses, step=step))
    assert losses
    return torch.stack(losses).sum()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_auxiliary_losses_are_part_of_the_loss_in_training(gradient_checkpointing: bool) -> None:
    model, ids = small(neuron=neuron(target=0.1)), tokens(2, 9)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    plain = model.eval()(ids, labels=ids).loss
    loss = model.train()(ids, labels=ids).loss
    aux = aux_of(model, ids)
    assert aux > 1e-3
    torch.testing.assert_close(loss, plain + aux)


def test_auxiliary_losses_are_part_of_a_classifiers_loss() -> None:
    torch.manual_seed(0)
    model = SpikeLMForSequenceClassification(SpikeLMConfig(**SMALL, neuron=neuron(target=0.1), num_labels=3))
    ids, labels = tokens(4, 9), torch.tensor([0, 1, 2, 0])
    plain = model.eval()(ids, labels=labels).loss
    whole = model.train()(ids, labels=labels).loss
    assert whole > plain + 1e-3
    halves = [
        model(ids[rows], labels=labels[rows], num_items_in_batch=4).loss for rows in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).sum(), whole, rtol=1e-2, atol=0)


def test_dropout_is_active_in_training_only() -> None:
    model, ids = small(dropout=0.5, neuron=neuron()), tokens(2, 9)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(5)
    first = model(ids).logits
    torch.manual_seed(5)
    assert torch.equal(model(ids).logits, first), "torch's generator decides"
    assert not torch.equal(first[0], model(ids[:1].expand(2, -1)).logits[1])
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_rows_and_ranks_drop_different_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(dropout=0.5, neuron=neuron()), tokens(1, 9).expand(2, -1)

    def logits(rank: int) -> Tensor:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
        torch.manual_seed(5)
        return model(ids).logits

    zero, one = logits(0), logits(1)
    assert torch.equal(zero, logits(0))
    rows = [*zero, *one]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_accumulated_micro_batches_equal_the_large_batch(tmp_path: Path) -> None:
    """Cross-entropy and auxiliary losses; the rows differ in the number of labels that count."""
    weights = []
    for rows, steps in ((8, 1), (2, 4)):
        model = small(neuron=neuron(target=0.1))
        trainer(
            model, tmp_path, Rows((20, 20, 5, 5)), max_steps=1, per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.5, max_grad_norm=1e9,
        ).train()  # fmt: skip
        weights.append([p.detach().clone() for p in model.parameters()])
    before = [p.detach() for p in small(neuron=neuron(target=0.1)).parameters()]
    moved = sum(float((a - b).square().sum()) for a, b in zip(weights[0], before, strict=True))
    apart = sum(float((a - b).square().sum()) for a, b in zip(*weights, strict=True))
    # The rate of a batch is not the mean of its parts' rates squared, so the two agree only nearly.
    assert apart < 1e-2 * moved


def test_auxiliary_losses_are_shared_among_micro_batches_by_their_labels() -> None:
    model, ids = small(neuron=neuron(target=0.1)), tokens(2, 9)
    labels = ids.clone()
    labels[0, 6:] = -100
    plain = model.eval()(ids, labels=labels, num_items_in_batch=52).loss
    loss = model.train()(ids, labels=labels, num_items_in_batch=torch.tensor(52)).loss
    torch.testing.assert_close(loss, plain + aux_of(model, ids) * 13 / 52)


@pytest.mark.parametrize("peft", [False, True])
def test_a_callback_tells_schedules_the_step(tmp_path: Path, peft: bool) -> None:
    base = small(neuron=neuron(start=2, ramp=4))
    model: nn.Module = base
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(base, LoraConfig(r=2, target_modules=["linear"], task_type="CAUSAL_LM"))
    made = trainer(model, tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="StepCallback"):
        made.train()
    made = trainer(model, tmp_path, gradient_accumulation_steps=2)
    made.add_callback(StepCallback())
    steps = []
    base.model.register_forward_pre_hook(lambda module, args: steps.append(args[2].step))
    made.train()
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]
    assert base.training_step == 3
    assert not peft or "training_step" not in vars(model)


@pytest.mark.parametrize("told", [True, False])
def test_the_callback_moves_the_bias_of_a_mixture(tmp_path: Path, told: bool) -> None:
    channel = {"name": "moe", "experts": 6, "top_k": 2, "hidden": 8, "loss_free_bias": 0.01}
    model = small(neuron=neuron(), layers=[{"mixer": {"name": "wkv4"}, "channel": channel}])
    made = trainer(model, tmp_path, gradient_accumulation_steps=2)
    loads: list[Tensor] = []
    moe = model.model.blocks[1].channel
    original = moe.balance
    moe.balance = lambda load: (loads.append(load), original(load))
    if told:
        made.add_callback(StepCallback())
    made.train()
    bias = model.state_dict()["model.blocks.1.channel.expert_bias"]
    assert [int(load.sum()) for load in loads] == ([2 * 4 * 20 * 2] * 4 if told else [])
    expected = sum((0.01 * (load.double().mean() - load).sign() for load in loads), torch.zeros(6).double())
    torch.testing.assert_close(bias.double(), expected, atol=1e-6, rtol=0)
    assert bool(bias.any()) == told


def test_the_step_decides_the_weight_of_the_rate_loss() -> None:
    model, ids = small(neuron=neuron(start=2, ramp=4)), tokens(2, 9)
    plain = model.eval()(ids, labels=ids).loss
    model.train()
    for step, share in ((0, 0.0), (3, 0.25), (99, 1.0)):
        model.training_step = step
        whole = aux_of(model, ids, step=99)
        torch.testing.assert_close(model(ids, labels=ids).loss, plain + share * whole)


@pytest.mark.parametrize("schedule", [{"start": 2}, {"ramp": 2}])
def test_a_schedule_without_a_step_is_refused(schedule: dict[str, int]) -> None:
    model, ids = small(neuron=neuron(**schedule)), tokens(2, 9)
    with pytest.raises(ConfigError, match="StepCallback"):
        model(ids, labels=ids)


def test_schedules_do_not_hinder_evaluation() -> None:
    model, ids = small(neuron=neuron(start=2)), tokens(2, 9)
    assert model.eval()(ids, labels=ids).loss.isfinite()
    assert model.train()(ids).logits.isfinite().all()


def test_packed_documents_of_the_padding_free_collator_do_not_leak(tmp_path: Path) -> None:
    documents = [{"input_ids": tokens(length).tolist()} for length in (7, 4, 9)]
    batch = DataCollatorWithFlattening()(documents)
    model = small(neuron=neuron()).double().eval()
    packed = model(**batch)
    apart = [model(torch.tensor([d["input_ids"]])).logits for d in documents]
    torch.testing.assert_close(packed.logits, torch.cat(apart, 1), rtol=0, atol=1e-12)
    made = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=3,
    )  # fmt: skip
    seen = []
    model = small(neuron=neuron())
    model.model.register_forward_pre_hook(lambda module, args: seen.append(args[2].reset))
    Trainer(
        model=model, args=made, train_dataset=documents, data_collator=DataCollatorWithFlattening()
    ).train()
    assert int(seen[0].sum()) == 2, "three documents, the first starts from the initial state anyway"
