"""TRL's trainers: the snippets of docs/recipes.md run as they stand, and their loss is the model's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spikelm.checkpoint import save_checkpoint
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.hf import SpikeLMConfig, SpikeLMForCausalLM
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "recipes.md"
SMALL = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def user(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"how are you, {number}?"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def prepare(folder: Path) -> SpikeLM:
    """What the snippets expect: a checkpoint with a chat template, chats and preferences."""
    made = Tokenizer.train_bpe(["hello there, how are you? fine, thanks. "] * 50, 300)
    made.save(folder / "words")
    (folder / "words/chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer.load(folder / "words")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, eos_token_id=tokenizer.eos_id
    )
    torch.manual_seed(0)
    core = SpikeLM(config)
    save_checkpoint(folder / "runs/mine/latest", core, tokenizer)
    chats = [{"messages": [user(i), assistant("fine, thanks")]} for i in range(12)]
    pairs = [
        {"prompt": [user(i)], "chosen": [assistant("fine, thanks")], "rejected": [assistant("go away")]}
        for i in range(12)
    ]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return core


def losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_documented_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    core = prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 2
    spaces: list[dict[str, Any]] = []
    for snippet in snippets:
        spaces.append({})
        exec(compile(snippet, "docs/recipes.md", "exec"), spaces[-1])
    sft, dpo = (space["trainer"] for space in spaces)
    first, *_, last = losses(sft)
    assert first == pytest.approx(math.log(core.config.vocab_size), rel=0.1)  # an untrained model
    assert last < first - 0.3
    before, after = core.state_dict(), load_file("runs/sft/model.safetensors")
    for name in ("embedding.weight", "blocks.0.mixer.key.linear.weight", "head.linear.weight"):
        assert not torch.equal(before[name], after[f"model.{name}"]), name
    # Policy and reference are the same model at first, so DPO's loss is log 2.
    first, *_, last = losses(dpo)
    assert first == pytest.approx(math.log(2.0), abs=1e-3)
    assert math.isfinite(last) and last != first
    adapters = load_file("runs/dpo/adapter_model.safetensors")
    moved = [name for name, value in adapters.items() if "lora_B" in name and bool(value.abs().max() > 0)]
    assert len(moved) == 2 * (3 + 3)  # key, value, receptance of both mixers and both channels
    # Without adapters the reference is loaded a second time, and all weights are trained.
    whole: dict[str, Any] = {}
    without, count = re.subn(r"\n    peft_config=.*", "", snippets[1])
    assert count == 1
    exec(compile(without, "docs/recipes.md", "exec"), whole)
    assert losses(whole["trainer"])[0] == pytest.approx(math.log(2.0), abs=1e-3)
    trained = load_file("runs/dpo/model.safetensors")
    assert not torch.equal(after["model.embedding.weight"], trained["model.embedding.weight"])


@pytest.mark.parametrize("masked", [False, True])
def test_the_backbone_and_the_head_are_the_model(masked: bool) -> None:
    torch.manual_seed(3)
    model = SpikeLMForCausalLM(SpikeLMConfig(**SMALL)).double().eval()
    ids = torch.randint(0, 23, (2, 7))
    mask = torch.ones_like(ids)
    if masked:
        mask[0, 4:] = 0
    features = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(features)
    assert torch.equal(logits, model(ids, attention_mask=mask).logits)
    assert model.base_model.config is model.model.config  # the rest is the core's


def test_what_a_foreign_loss_would_pass_over_is_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    headed = SpikeLMForCausalLM(SpikeLMConfig(**SMALL, head_neuron={"name": "adaptive"}))
    with pytest.raises(ConfigError, match="a neuron before its head"):
        headed.base_model(ids)
    neuron = {"name": "adaptive", "rate_target": {"target": 0.1}}
    regulated = SpikeLMForCausalLM(SpikeLMConfig(**SMALL, neuron=neuron)).train()
    with pytest.raises(ConfigError, match=r"auxiliary losses \(rate_target of a neuron"):
        regulated.base_model(ids)
    with torch.no_grad():
        regulated.base_model(ids)
    with pytest.raises(ConfigError, match="argument of the model"):
        headed.base_model(ids, labls=ids)
