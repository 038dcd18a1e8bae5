"""The quick figure of the log: which blocks it uses and what they know of one another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.data import TokenBlocks
from spikelm.loss import next_token_loss
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer
from spikelm.train.batches import MicroBatch, micro_batches
from spikelm.train.config import TrainConfig
from spikelm.train.evaluation import Evaluation, evaluate
from spikelm.train.trainer import Trainer

# Documents without separator, several of them in a block of 16.
DOCUMENTS = ["spike " * (1 + i % 4) + "abcdefgh"[i % 8] * (1 + i % 7) for i in range(80)]


@pytest.fixture
def trainer(make_values: Any, tmp_path: Path) -> Trainer:
    """A run on those documents whose weights are not those of the start (where the head is zero)."""
    text = "\n".join(json.dumps({"text": document}) for document in DOCUMENTS)
    (tmp_path / "documents.jsonl").write_text(text)
    values = make_values(model__dropout=0.0, model__neuron={"name": "none"}, log_every=1)
    values["data"]["train"] = str(tmp_path / "documents.jsonl") + "#text"
    found = Trainer(TrainConfig.from_dict(values))
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


def measure(trainer: Trainer, *, step: int = 0, samples: int = 0, rows: int = 4) -> Evaluation:
    blocks = TokenBlocks.from_documents(DOCUMENTS, Tokenizer.bytes(), 16)
    found = evaluate(trainer._backend, blocks, step=step, samples=samples, rows=rows, stopped=lambda: False)
    assert found is not None
    return found[0]


def alone(model: SpikeLM, batches: list[MicroBatch]) -> tuple[float, int]:
    """Mean nats and number of targets where every document of every block is read by itself."""
    nats, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for inputs, targets, reset in zip(batch.inputs, batch.targets, batch.reset, strict=True):
                cuts = [0, *(t for t in range(1, len(reset)) if reset[t]), len(reset)]
                for start, stop in zip(cuts, cuts[1:], strict=False):
                    output = next_token_loss(model, inputs[None, start:stop], targets[None, start:stop])
                    nats, count = nats + float(output.nats), count + int(output.count)
    return nats / count, count


def test_documents_are_read_by_themselves(trainer: Trainer) -> None:
    blocks = TokenBlocks.from_documents(DOCUMENTS, Tokenizer.bytes(), 16)
    batches = micro_batches(blocks, 0, 0, len(blocks), 1)
    expected, count = alone(trainer.model, batches)
    evaluation = measure(trainer)
    assert evaluation.tokens == count
    assert evaluation.loss == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        leaking = next_token_loss(trainer.model, batches[0].inputs, batches[0].targets)
    assert abs(float(leaking.nats) / count - expected) > 1e-3  # otherwise this test would say nothing


def test_documents_are_read_by_themselves_in_training_too(trainer: Trainer) -> None:
    batches = micro_batches(trainer._text.train, trainer.config.seed, 0, 4, 1)
    expected, _ = alone(trainer.model, batches)
    trainer.run()
    assert trainer.log.read("step")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_same_blocks_at_every_step(trainer: Trainer) -> None:
    few = [measure(trainer, step=step, samples=6) for step in (0, 1, 8)]
    assert len({evaluation.loss for evaluation in few}) == 1
    assert few[0].loss != measure(trainer).loss  # six blocks are not all of them
    assert few[0].bits_per_byte == pytest.approx(few[0].loss / math.log(2.0))


def test_the_same_blocks_in_every_run(make_values: Any, tmp_path: Path) -> None:
    """Whatever the seed: figures of two runs can be compared."""
    seen = []
    for seed in (0, 1):
        trainer = Trainer(
            TrainConfig.from_dict(make_values(seed=seed, steps=4, out=str(tmp_path / f"{seed}")))
        )
        valid = trainer._text.valid
        assert valid is not None
        tokens = []
        original = valid.batch

        def batch(*args: Any, tokens: list[Any] = tokens, original: Any = original) -> Any:
            found = original(*args)
            tokens.append(found.inputs.tolist())
            return found

        valid.batch = batch  # type: ignore[method-assign]
        trainer.run()
        seen.append(tokens)
    assert seen[0] == seen[1] and len(seen[0]) == 2
