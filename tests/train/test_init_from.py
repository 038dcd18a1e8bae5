"""Language-model fine-tuning: a run that starts from the weights of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.tokenizer import Tokenizer
from spikelm.train.config import TrainConfig
from spikelm.train.setup import build_model
from spikelm.train.trainer import Trainer


def test_weights_only(finished_run: Path, make_values: Any, tmp_path: Path) -> None:
    """The first loss is the checkpoint's, the optimiser and the step count are new."""
    stored = load_model(finished_run)
    values = make_values(init_from=str(finished_run), steps=3, log_every=1)
    values["model"] = None
    del values["data"]["cache"]
    trainer = Trainer(TrainConfig.from_dict(values))
    assert trainer.config.data.tokenizer == str(finished_run / "latest")
    for name, value in stored.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    result = trainer.run()
    assert result.step == 3 and result.resumed_from is None
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line["event"] == "step"]
    assert losses[0] < 5.0  # 5.55 is what an untrained model says of 256 bytes
    assert Trainer(TrainConfig.from_dict({**values, "steps": 4})).run().resumed_from == 3


def test_single_values_replace_the_checkpoints(finished_run: Path, make_values: Any) -> None:
    config = TrainConfig.from_dict({**make_values(init_from=str(finished_run)), "model": {"dropout": 0.25}})
    model = build_model(config, Tokenizer.bytes())
    stored = load_model(finished_run)
    assert model.config.dropout == 0.25 and model.config.hidden_size == stored.config.hidden_size
    assert model.config.neuron == stored.config.neuron


def test_low_precision_and_tied_weights_are_taken_too(make_values: Any, tmp_path: Path) -> None:
    from spikelm.config import ModelConfig
    from spikelm.model import SpikeLM

    core = SpikeLM(ModelConfig(hidden_size=16, num_hidden_layers=1, tie_word_embeddings=True)).bfloat16()
    save_checkpoint(tmp_path / "low", core, Tokenizer.bytes())
    config = TrainConfig.from_dict({**make_values(init_from=str(tmp_path / "low")), "model": None})
    model = build_model(config, Tokenizer.bytes())
    assert model.head is not None and model.head.linear.weight is model.embedding.weight
    assert model.embedding.weight.dtype == torch.float32
    assert torch.equal(model.embedding.weight.bfloat16(), core.embedding.weight)


def test_what_does_not_fit_is_one_sentence(finished_run: Path, make_values: Any, tmp_path: Path) -> None:
    other = tmp_path / "bpe"
    Tokenizer.train_bpe(["some words and other words"] * 20, 260).save(other)
    base = {**make_values(init_from=str(finished_run)), "model": None}

    def build(values: dict[str, Any]) -> None:
        config = TrainConfig.from_dict(values)
        build_model(config, Tokenizer.load(config.data.tokenizer))

    with pytest.raises(DataError, match="data.tokenizer is .*bpe with 260 tokens, and init_from .* leave"):
        build({**base, "data": {**base["data"], "tokenizer": str(other)}})
    with pytest.raises(ConfigError, match="brings its model; leave model out"):
        build({**base, "model": "spikegpt-nano"})
    with pytest.raises(CheckpointError, match=r"'.*' is \(.*\), the configuration expects"):
        build({**base, "model": {"hidden_size": 32}})
    with pytest.raises(CheckpointError, match="holds no config.json"):
        build({**base, "init_from": str(tmp_path), "data": {**base["data"], "tokenizer": "bytes"}})


def test_a_missing_checkpoint_is_told_as_one(make_values: Any) -> None:
    config = TrainConfig.from_dict({**make_values(init_from="nowhere"), "model": None})
    with pytest.raises(CheckpointError, match="init_from is 'nowhere', and there is no such folder"):
        Trainer(config)
