"""Memory that grows (full attention) through generation, transformers, evaluation and training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, StateError
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.perplexity import Windows, measure
from spikelm.generation import generate
from spikelm.model import SpikeLM
from spikelm.sampling import Sampler
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
VOCAB = 256
HYBRID: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "layers": [
        {"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv"}},
        {"mixer": {"name": "swa", "window": 4, "num_heads": 2}, "channel": {"name": "rwkv"}},
        {
            "mixer": {"name": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
            "channel": {"name": "rwkv"},
        },
    ],
    "norm": "rmsnorm",
    "initializer_range": 0.4,
    "neuron": {"name": "none"},
}


def hybrid(**changes: Any) -> SpikeLM:
    torch.manual_seed(5)
    return SpikeLM(ModelConfig(**{"vocab_size": VOCAB, **HYBRID, **changes})).double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy(model: SpikeLM, prompt: list[int], count: int) -> list[int]:
    """The whole text is read anew for every token."""
    text = list(prompt)
    for _ in range(count):
        logits, _ = model(torch.tensor([text]))
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


@torch.no_grad()
def test_the_model_knows_its_room() -> None:
    model, x = hybrid(), tokens(2, 11)
    assert model.grows and not hybrid(layers=HYBRID["layers"][:2], num_hidden_layers=2).grows
    whole, _ = model(x)
    state = model.init_state(2, max_len=6)
    assert model.capacity(state) == 6
    first, state = model(x[:, :6], state)
    with pytest.raises(StateError, match=r"blocks\.2\.mixer got a token at position 6, .* room for 6 tokens"):
        model(x[:, 6], state)
    state = model.reserve(state, 11)
    assert model.capacity(state) == 11
    rest, _ = model(x[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-10, atol=1e-10)
    with pytest.raises(StateError, match="max_len=None"):
        model.init_state(1)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("chunk", [3, 512])
def test_generation_reserves_prompt_and_text(sinks: int, chunk: int) -> None:
    model = hybrid(sink_tokens=sinks)
    prompt = tokens(1, 10)[0].tolist()
    pieces = list(generate(model, BYTES, prompt, 12, Sampler(temperature=0), chunk=chunk, ignore_eos=True))
    assert [piece.token for piece in pieces] == greedy(model, prompt, 12)


def test_the_command_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hybrid()
    checkpoint = save_checkpoint(tmp_path / "model", model.float(), BYTES)
    arguments = ["--prompt", "The ", "--max-tokens", "9", "--temperature", "0", "--json", "-"]
    assert main(["generate", str(checkpoint), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == greedy(model.eval(), BYTES.encode("The "), 9)
    assert result["state_bytes"] > 2 * (4 + 9) * 2 * 4 * 4, "keys and values of prompt and text"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_transformers_generate_doubles_the_room(
    beams: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and beam search, left padding: as without any cache; copies are as many as doublings."""
    from spikelm.hf import SpikeLMConfig, SpikeLMForCausalLM

    torch.manual_seed(5)
    model = SpikeLMForCausalLM(SpikeLMConfig(vocab_size=VOCAB, **HYBRID)).double().eval()
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    reserved: list[int] = []
    original = SpikeLM.reserve

    def reserve(self: SpikeLM, state: Any, max_len: int) -> Any:
        reserved.append(max_len)
        return original(self, state, max_len)

    monkeypatch.setattr(SpikeLM, "reserve", reserve)
    common: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with_cache = model.generate(ids, **common)
    assert reserved == [10, 20, 40]
    without = model.generate(ids, use_cache=False, **common)
    assert torch.equal(with_cache.sequences, without.sequences)
    for got, wanted in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def corpus(*lengths: int) -> Corpus:
    documents = [tokens(1, length)[0].numpy().astype(np.int32) for length in lengths]
    return Corpus(
        name="random",
        sha256="",
        bytes=sum(lengths),
        start_token=None,
        tokens=documents,
        byte_lengths=[np.ones(length) for length in lengths],
        rescaled=0,
    )


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 512), (2, 7)])
@torch.no_grad()
def test_evaluation_makes_room_for_the_longest_document(batch_size: int, chunk: int) -> None:
    model, text = hybrid(), corpus(50, 9, 31, 1, 22)
    windows = Windows(length=8, stride=3, batch_size=batch_size, chunk=chunk)
    result = measure(model, text, windows, vocab_size=VOCAB)
    found = {figure.label: figure.nats for figure in result.figures}

    def nats(document: Any, first: int, stop: int, scored: int) -> float:
        x = torch.from_numpy(document[first:stop].astype(np.int64))[None]
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1])[0][0], x[0, 1:], reduction="none")
        return float(loss[scored:].sum())

    carried = sum(nats(document, 0, len(document), 0) for document in text.tokens if len(document) > 1)
    disjoint = sum(
        nats(document, first, first + 9, 0)
        for document in text.tokens
        for first in range(0, len(document) - 1, 8)
    )
    assert found["carried"] == pytest.approx(carried, rel=1e-9)
    assert found["disjoint@8"] == pytest.approx(disjoint, rel=1e-9)
    assert math.isfinite(found["strided@8/3"])


def values_of(folder: Path, **data: Any) -> dict[str, Any]:
    (folder / "train.txt").write_text("the spike of a neuron is a small thing, and many say it. " * 60)
    return {
        "model": {**HYBRID, "initializer_range": 0.05},
        "data": {
            "train": str(folder / "train.txt"),
            "valid": str(folder / "train.txt"),
            "block_length": 24,
            "cache": str(folder / "cache"),
            **data,
        },
        "optim": {"lr": 1e-2},
        "schedule": {"warmup": 2},
        "steps": 40,
        "batch_size": 4,
        "eval_every": 40,
        "eval_batches": 2,
        "checkpoint_every": 0,
        "log_every": 10,
        "device": "cpu",
        "trackers": [],
        "measure_mfu": False,
        "out": str(folder / "run"),
    }


def test_training_in_blocks_learns(tmp_path: Path) -> None:
    from spikelm.train.config import TrainConfig
    from spikelm.train.trainer import Trainer

    Trainer(TrainConfig.from_dict(values_of(tmp_path))).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert losses[0] > 4 and losses[-1] < losses[0] - 1


def test_training_with_carried_state_is_refused_at_the_start(tmp_path: Path) -> None:
    from spikelm.train.config import TrainConfig
    from spikelm.train.trainer import Trainer

    message = (
        r"data\.carried is true, and the state of blocks\.2\.mixer .* grow without bound; set data\.carried"
    )
    with pytest.raises(ConfigError, match=message):
        Trainer(TrainConfig.from_dict(values_of(tmp_path, carried=True)))
