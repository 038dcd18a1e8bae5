"""The transformers wrapper: configuration, loss, padding, generate, save and load, Trainer, LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.hf import (
    RecurrentCache,
    SpikeLMConfig,
    SpikeLMForCausalLM,
    SpikeLMForSequenceClassification,
)
from spikelm.model import SpikeLM

SMALL = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2}
SD = {"placement": "before", "neuron": {"name": "adaptive", "k": 3.0, "dead_zone": 1.0}}
LIF = {"placement": "after", "neuron": {"name": "lif"}, "embedding_neuron": {"name": "heaviside"}}
TWIN = {"placement": "before", "neuron": {"name": "none"}}


def small(**values: object) -> SpikeLMForCausalLM:
    torch.manual_seed(3)
    model = SpikeLMForCausalLM(SpikeLMConfig(**SMALL, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(1))


def test_defaults_are_those_of_the_core() -> None:
    assert SpikeLMConfig().to_core() == ModelConfig.from_dict(ModelConfig().to_dict())


def test_unknown_keys_are_refused_and_the_nearest_is_named() -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        SpikeLMConfig(hiden_size=4)
    with pytest.raises(ConfigError, match="placement"):
        SpikeLMConfig(placement="between")


def test_labels_give_the_shifted_cross_entropy() -> None:
    model, ids = small(**SD), tokens(2, 9)
    labels = ids.clone()
    labels[0, 5:] = -100
    output = model(ids, labels=labels)
    logits = model(ids).logits
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 23), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, wanted)
    assert tuple(output.logits.shape) == (2, 9, 23)


@pytest.mark.parametrize("options", [SD, LIF, TWIN], ids=["sd", "lif", "twin"])
def test_padding_left_or_right_equals_none(options: dict[str, object]) -> None:
    model, ids = small(**options).double(), tokens(1, 7)
    plain = model(ids).logits
    pad = torch.zeros(1, 3, dtype=torch.long)
    ones, zeros = torch.ones(1, 7, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    left = model(torch.cat([pad, ids], 1), attention_mask=torch.cat([zeros, ones], 1)).logits[:, 3:]
    right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, zeros], 1)).logits[:, :7]
    torch.testing.assert_close(left, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(right, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [SD, LIF, TWIN], ids=["sd", "lif", "twin"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_state_equals_generate_without(options: dict[str, object], beams: int) -> None:
    """Every step from the state must give what recomputing the whole text gives."""
    model = small(**options).double()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    cached = model.generate(ids, use_cache=True, **arguments)
    plain = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 14)


def test_generate_feeds_one_token_a_step_and_the_state_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths, sizes = small(**LIF), [], set()
    forward = SpikeLMForCausalLM.forward

    def spy(self: SpikeLMForCausalLM, input_ids: Tensor, **kwargs: object) -> object:
        output = forward(self, input_ids, **kwargs)
        lengths.append(input_ids.shape[1])
        from spikelm.state import state_bytes

        sizes.add(state_bytes(output.past_key_values.state))
        return output

    monkeypatch.setattr(SpikeLMForCausalLM, "forward", spy)
    model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert lengths == [5, 1, 1, 1, 1, 1]
    assert len(sizes) == 1


def test_save_and_load_through_auto_classes_and_through_the_core(tmp_path: Path) -> None:
    model, ids = small(**SD), tokens(2, 9)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(again(ids).logits, logits)
    core = load_model(tmp_path / "hf")
    assert torch.equal(core(ids)[0], logits)
    save_checkpoint(tmp_path / "core", core)
    assert AutoConfig.from_pretrained(tmp_path / "core").to_core() == core.config
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "core")
    assert torch.equal(back(ids).logits, logits)
    assert json.loads((tmp_path / "core" / "config.json").read_text())["format_version"] == 1


def test_tied_head_is_one_tensor_before_and_after_loading(tmp_path: Path) -> None:
    model = small(**SD, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    ids = tokens(1, 5)
    assert torch.equal(again(ids).logits, model(ids).logits)
    core = load_model(tmp_path)
    assert core.head is not None and core.head.linear.weight is core.embedding.weight
    assert torch.equal(core(ids)[0], model(ids).logits)


def test_low_precision_keeps_decays_in_float32(tmp_path: Path) -> None:
    small(**LIF).save_pretrained(tmp_path)
    core = load_model(tmp_path, dtype=torch.bfloat16)
    block = core.blocks[0]
    assert block.mixer.time_decay.dtype == torch.float32
    assert block.mixer.key.linear.weight.dtype == torch.bfloat16
    logits, _ = core(tokens(1, 5))
    assert logits.isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids = tokens(2, 12)
    gradients = []
    for checkpointing in (False, True):
        model = small(**SD, dropout=0.1).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-14)


def test_sequence_classification_reads_the_last_real_token(tmp_path: Path) -> None:
    small(**SD).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).double().eval()
    assert isinstance(model, SpikeLMForSequenceClassification)
    ids = tokens(1, 6)
    plain = model(ids).logits
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, plain, rtol=0, atol=1e-12)
    output = model(ids, labels=torch.tensor([2]))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(plain, torch.tensor([2])))


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of one repeated pattern: quickly learnt."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(20) * 3 + index) % 23
        return {"input_ids": row, "labels": row}


def trainer(model: torch.nn.Module, folder: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=1, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def losses_of(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_the_hugging_face_trainer_trains_it(tmp_path: Path) -> None:
    model = SpikeLMForCausalLM(SpikeLMConfig(**SMALL, **SD))
    made = trainer(model, tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2)
    made.train()
    losses = losses_of(made)
    assert losses[-1] < 0.7 * losses[0]
    assert made.evaluate()["eval_loss"] < losses[0]
    made.save_model(str(tmp_path / "out"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), SpikeLMForCausalLM)


def test_peft_lora_trains_only_its_own_weights_and_sees_spikes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = small(**SD)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["linear"], task_type="CAUSAL_LM"))
    seen: list[Tensor] = []
    adapter = next(m for n, m in model.named_modules() if n.endswith("mixer.key.linear.lora_A.default"))
    adapter.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    made = trainer(model, tmp_path)
    made.train()
    losses = losses_of(made)
    assert losses[-1] < losses[0]
    assert torch.equal(seen[0], seen[0].round()), "the adapter's input is integer spikes"
    after = {n.replace(".base_layer", ""): v for n, v in base.state_dict().items() if "lora" not in n}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    merged = model.merge_and_unload().eval()
    ids = tokens(1, 6)
    assert merged.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 9)


def test_a_recurrent_cache_is_given_and_taken(tmp_path: Path) -> None:
    model, ids = small(**LIF).double(), tokens(2, 10)
    whole = model(ids).logits
    first = model(ids[:, :6], use_cache=True)
    assert isinstance(first.past_key_values, RecurrentCache) and first.past_key_values.get_seq_length() == 6
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-12)


def test_core_and_wrapper_are_the_same_network() -> None:
    model = small(**SD)
    assert isinstance(model.model, SpikeLM)
    assert model.num_parameters() == model.model.num_parameters()
