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
from spikelm.config import FORMAT_VERSION, ModelConfig
from spikelm.errors import CheckpointError, ConfigError
from spikelm.hf import (
    SpikeLMConfig,
    SpikeLMForCausalLM,
    SpikeLMForSequenceClassification,
)
from spikelm.model import SpikeLM

from .wrapped import LIF, PLIF, SD, SMALL, TWIN, small, tokens


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
    assert json.loads((tmp_path / "core" / "config.json").read_text())["format_version"] == FORMAT_VERSION


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


@pytest.mark.parametrize("options", [SD, LIF, PLIF], ids=["sd", "lif", "plif"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_pretrained_in_low_precision_keeps_decays_in_float32(
    tmp_path: Path, options: dict[str, object], dtype: torch.dtype
) -> None:
    saved = small(**options)
    saved.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    kept = model.model.fp32_parameters()
    suffixes = {name.rsplit(".", 1)[-1] for name in kept}
    assert {"time_decay", "time_first"} <= suffixes
    assert options is not PLIF or {"leak_logit", "log_gain"} <= suffixes
    before = dict(saved.model.named_parameters())
    for name, parameter in model.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in kept else dtype), name
        if name in kept:
            assert torch.equal(parameter, before[name])
    core = load_model(tmp_path, dtype=dtype)
    assert {n: p.dtype for n, p in core.named_parameters()} == {
        n: p.dtype for n, p in model.model.named_parameters()
    }
    if dtype == torch.bfloat16:
        assert model(tokens(1, 5)).logits.isfinite().all()


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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [31, 17, 23])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resizing_the_vocabulary(tmp_path: Path, tied: bool, size: int, mean_resizing: bool) -> None:
    model = small(**SD, tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    ids = tokens(1, 5) % 17
    kept = model(ids).logits[..., :17].detach()
    model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    embedding, out = model.get_input_embeddings(), model.get_output_embeddings()
    same = min(size, 23)
    assert embedding.weight.shape == out.weight.shape == (size, 16)
    assert embedding.num_embeddings == out.out_features == model.model.head.out_features == size
    assert model.config.vocab_size == model.model.config.vocab_size == size
    assert torch.equal(embedding.weight[:same], before[:same]) and torch.equal(out.weight[:same], head[:same])
    assert (embedding.weight is out.weight) == tied
    if not mean_resizing and size > 23:
        assert embedding.weight[23:].abs().max() < 1e-3, "as the core begins"
    assert torch.equal(model(ids).logits[..., :17], kept)
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    logits = model(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    assert torch.equal(load_model(tmp_path)(ids)[0], logits)


def test_resizing_pads_and_refuses_to_cut_off_the_end_token() -> None:
    model = small(**SD, eos_token_id=22)
    assert model.resize_token_embeddings(pad_to_multiple_of=8).num_embeddings == 24
    assert model.model.config.vocab_size == 24
    with pytest.raises(ConfigError, match="eos_token_id"):
        model.resize_token_embeddings(20)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 24
    model.resize_token_embeddings(4024, mean_resizing=False)
    rows = model.get_output_embeddings().weight[24:]
    torch.testing.assert_close(rows.std(), torch.tensor(0.5 / 16**0.5), rtol=0.03, atol=0)
    classifier = SpikeLMForSequenceClassification(SpikeLMConfig(**SMALL, **SD))
    classifier.resize_token_embeddings(30)
    assert classifier.model.config.vocab_size == classifier.config.vocab_size == 30


def test_several_end_tokens(tmp_path: Path) -> None:
    model = small(**SD, eos_token_id=[4, 7])
    assert model.config.to_core().eos_token_id == 4
    ids = tokens(1, 5)
    made = model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generation_config.eos_token_id = [4, int(made[0, -1])]
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.eos_token_id == 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.eos_token_id == 4
    assert again.generation_config.eos_token_id == [4, int(made[0, -1])]
    assert again.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0).shape == (1, 6)
    assert SpikeLMConfig(**SMALL, eos_token_id=[]).to_core().eos_token_id is None
    with pytest.raises(ConfigError, match="eos_token_id"):
        SpikeLMConfig(**SMALL, eos_token_id=[4, 23])


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    model = small(**SD)
    state = model.state_dict()
    state.pop("model.blocks.1.channel.key.linear.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="blocks.1.channel.key"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"another shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, hidden_size=8, ignore_mismatched_sizes=True)


def test_core_and_wrapper_are_the_same_network() -> None:
    model = small(**SD)
    assert isinstance(model.model, SpikeLM)
    assert model.num_parameters() == model.model.num_parameters()
