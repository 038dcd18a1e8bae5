"""Trained models on real questions: our answers are those of the harness's HFLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file

import spikelm.hf  # noqa: F401 (the Auto classes know the model)
from spikelm.checkpoint import save_checkpoint
from spikelm.config import ModelConfig
from spikelm.evaluation.tasks import offline
from spikelm.evaluation.tasks.language_model import HarnessModel, load
from spikelm.formats.rwkv4 import read_rwkv4
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def models(data_dir: Path) -> Path:
    if not (data_dir / "models").is_dir() or not (data_dir / "eval").is_dir():
        pytest.skip("the data folder has no models/ and eval/")
    return data_dir / "models"


def answered(model: Any, task: str) -> tuple[dict[str, float], list[tuple[float, bool]]]:
    found = simple_evaluate(
        model=model,
        tasks=[offline.config(task)],
        limit=20,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
    )
    figures = {k: v for k, v in found["results"][task].items() if k in ("acc,none", "acc_norm,none")}
    return figures, [response[0] for sample in found["samples"][task] for response in sample["resps"]]


def assert_alike(ours: HarnessModel, other: HFLM, tasks: tuple[str, ...], tolerance: float) -> None:
    right = 0.0
    for task in tasks:
        (figures, mine), (expected, theirs) = answered(ours, task), answered(other, task)
        np.testing.assert_allclose([a for a, _ in mine], [a for a, _ in theirs], rtol=0, atol=tolerance)
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
        assert figures == expected
        right += figures["acc,none"]
    assert right > 0


def test_a_trained_rwkv(models: Path, tmp_path: Path) -> None:
    model = read_rwkv4(models / "rwkv4-660k" / "tiny-rwkv-4v0-660K-FP32.bin.xz").model()
    folder = save_checkpoint(tmp_path / "rwkv", model, Tokenizer.bytes())
    ours = load(folder)
    other = HFLM(str(folder), device="cpu", dtype="float32", batch_size=8, prefix_token_id=10)
    assert_alike(ours, other, ("copa_local", "winograd_wsc_local"), 1e-4)


def test_a_trained_llama_whose_layers_are_ours(models: Path, tmp_path: Path) -> None:
    """HFLM runs transformers' Llama here, so that nothing but the questions is shared with our side."""
    folder = models / "teacher-4m"
    foreign = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    config = ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=5,
        layers=[
            {
                "mixer": {"name": "attention", "num_heads": 8, "num_kv_heads": 4, "rope_theta": 10000.0},
                "channel": {"name": "swiglu", "hidden": 704},
            }
        ],
        neuron={"name": "none"},
        norm="rmsnorm",
        layer_norm_epsilon=1e-6,
        embedding_norm=False,
        tie_word_embeddings=True,
    )
    model = SpikeLM(config)
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    parts = {
        "mixer_norm.weight": "input_layernorm.weight",
        "channel_norm.weight": "post_attention_layernorm.weight",
        "mixer.query.linear.weight": "self_attn.q_proj.weight",
        "mixer.key.linear.weight": "self_attn.k_proj.weight",
        "mixer.value.linear.weight": "self_attn.v_proj.weight",
        "mixer.output.linear.weight": "self_attn.o_proj.weight",
        "channel.gate.linear.weight": "mlp.gate_proj.weight",
        "channel.up.linear.weight": "mlp.up_proj.weight",
        "channel.down.linear.weight": "mlp.down_proj.weight",
    }
    for layer in range(5):
        names |= {f"blocks.{layer}.{own}": f"model.layers.{layer}.{name}" for own, name in parts.items()}
    names["head.linear.weight"] = names["embedding.weight"]
    model.load_state_dict({own: foreign[name] for own, name in names.items()})
    model.tie_weights()
    ours = load(save_checkpoint(tmp_path / "llama", model, Tokenizer.load(folder)))
    other = HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)
    assert_alike(ours, other, ("arc_easy_local", "piqa_local"), 1e-3)
