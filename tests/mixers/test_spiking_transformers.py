"""Models of ``ssa`` and ``sdsa``: spikes at every projection, presets that learn, encoders."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

import spikelm.hf  # noqa: F401 (makes the Auto classes know the model)
from spikelm.classifier import Classifier, load_classifier
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.state import state_bytes
from spikelm.train.finetune.config import FinetuneConfig
from spikelm.train.finetune.seeds import finetune

PRESETS = ("spikformer-lm-nano", "spike-driven-lm-nano")
TEXT = b"the spike of a neuron is a small thing, and many of them say what one of them cannot; "


def small(mixer: dict[str, Any], **values: Any) -> ModelConfig:
    layer = {"mixer": mixer, "channel": {"name": "mlp", "expand": 2.0}}
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "neuron": {"name": "plif", "gain": 1.0}, **values}
    return ModelConfig.from_dict({"vocab_size": 256, "layers": [layer], **settings})


def tokens(rows: int = 3, steps: int = 24) -> torch.Tensor:
    return torch.randint(256, (rows, steps), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    config = ModelConfig.from_yaml(preset)
    with torch.device("meta"):
        model = SpikeLM(config)
    assert 1.7e6 < model.num_parameters() < 2.3e6
    sizes = set()
    for length in (1_000, 100_000, 1_000_000):
        state = model.init_state(1, "cpu", max_len=length)
        assert model.capacity(state) is None
        sizes.add(state_bytes(state))
    assert len(sizes) == 1


def test_the_twin_preset_is_the_twin() -> None:
    twin = ModelConfig.from_yaml("spikformer-lm-nano").twin()
    assert ModelConfig.from_yaml("spikformer-lm-nano-twin").to_dict() == twin.to_dict()
    meter = Meter()
    with torch.no_grad():
        SpikeLM(twin)(tokens(1), None, Context(meter=meter))
    assert meter.summary()["total"]["spiking_share"] == 0.0 and not meter.summary()["neurons"]


@pytest.mark.parametrize("preset", PRESETS)
def test_membrane_shortcut_every_projection_sees_spikes(preset: str) -> None:
    """Placement before: the residual stream is continuous; what meets weights is 0 or 1 but for the head."""
    config = ModelConfig.from_yaml(preset)
    torch.manual_seed(0)
    model, meter = SpikeLM(config), Meter()
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.blocks.named_modules():
        if name.endswith(".linear"):
            module.register_forward_pre_hook(lambda _m, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        model(tokens(2, 64), None, Context(meter=meter))
    summary = meter.summary()
    projections = summary["projections"]
    blocks = {path: entry for path, entry in projections.items() if path != "head"}
    assert len(blocks) == len(inputs) == 4 * 6
    assert all(entry["spiking"] for entry in blocks.values()) and not projections["head"]["spiking"]
    macs = {path: entry["in_features"] * entry["out_features"] for path, entry in projections.items()}
    assert summary["total"]["spiking_share"] == pytest.approx(1 - macs["head"] / sum(macs.values()))
    for name, x in inputs.items():
        assert set(x.unique().tolist()) <= {0.0, 1.0}, name
    neurons = summary["neurons"]
    assert {path.rsplit(".", 1)[1] for path in neurons} >= {"query_neuron", "key_neuron", "value_neuron"}
    assert all(entry["firing_rate"] > 0.01 for path, entry in neurons.items() if "attention" not in path)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_projection_learns_from_the_start(preset: str) -> None:
    """A neuron that never fires lets no gradient reach the weights behind it."""
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(preset))
    ids = torch.tensor(list((TEXT * 2)[:128])).view(2, 64)
    F.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if name.endswith("linear.weight") and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not silent


def fit(model: SpikeLM, batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]], steps: int) -> list[float]:
    """Losses of ``steps`` steps on (tokens [B, T], targets [B, T'] of the last T' columns)."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(steps):
        ids, targets = batch(step)
        logits = model(ids)[0][:, -targets.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_learn(preset: str) -> None:
    """The preset with fewer features: far below what bytes without their context can give."""
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(preset, hidden_size=48, num_hidden_layers=2))
    rows = torch.tensor(list(TEXT * 4)).unfold(0, 49, 13)
    frequency = torch.bincount(rows.flatten(), minlength=256).float() / rows.numel()
    unigram = -(frequency * frequency.clamp(min=1e-9).log()).sum()

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = rows[(torch.arange(8) * 3 + step) % len(rows)]
        return chosen[:, :-1], chosen[:, 1:]

    losses = fit(model, batch, 40)
    assert losses[0] == pytest.approx(math.log(256), abs=1.0)
    assert sum(losses[-5:]) / 5 < 0.6 * unigram, (losses[::10], unigram)


def recall(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One of four words, 13 to 16 random ones, a question: which of the four was it?"""
    answer = torch.randint(4, (rows, 1), generator=generator)
    ids = torch.randint(4, 12, (rows, 17), generator=generator)
    ids[:, -1] = 12
    ids.scatter_(1, torch.randint(0, 4, (rows, 1), generator=generator), answer)
    return ids, answer


@pytest.mark.parametrize(
    ("mixer", "low", "high"),
    [
        ({"name": "ssa", "num_heads": 2}, 0.95, 1.0),
        ({"name": "sdsa"}, 0.5, 1.0),
        ({"name": "ssa", "num_heads": 2, "scale": 1e-6}, 0.0, 0.35),
    ],
)
def test_the_sum_is_a_memory(mixer: dict[str, Any], low: float, high: float) -> None:
    """With the attention silenced (third case) membranes alone cannot answer: a quarter is chance."""
    torch.manual_seed(0)
    model = SpikeLM(small(mixer, vocab_size=16, num_hidden_layers=1))
    generator = torch.Generator().manual_seed(1)
    fit(model, lambda _: recall(32, generator), 100)
    ids, answer = recall(512, torch.Generator().manual_seed(9))
    with torch.no_grad():
        guess = model(ids, last_only=True)[0].argmax(-1)
    assert low <= (guess == answer).float().mean() <= high


@pytest.mark.parametrize("name", ["ssa", "sdsa"])
def test_a_language_model_must_be_causal(name: str) -> None:
    config = small({"name": name, "causal": False})
    with pytest.raises(ConfigError, match=r"blocks\.0\.mixer is not causal.*causal: true.*encoder"):
        SpikeLM(config)
    with pytest.raises(ConfigError, match="sink tokens reach a text through memory"):
        SpikeLM(small({"name": name, "causal": False}, sink_tokens=2), with_head=False)
    SpikeLM(small({"name": name}))


@pytest.mark.parametrize("name", ["ssa", "sdsa"])
def test_an_encoder_sees_both_sides_of_its_document_only(name: str) -> None:
    torch.manual_seed(1)
    mixer = {"name": name, "causal": False, "num_heads": 2, "neuron": {"name": "heaviside"}}
    # Neurons elsewhere would hide a change that is too small for them.
    model = SpikeLM(small(mixer, neuron={"name": "none"}), with_head=False).double()
    ids, changed = tokens(), tokens()
    changed[:, -1] = (changed[:, -1] + 7) % 256
    reset = torch.zeros(ids.shape, dtype=torch.bool)
    reset[:, 10] = True
    for ctx, reach in ((Context(), 0), (Context(reset=reset), 10)):
        h, other = (model.hidden(value, None, ctx)[0] for value in (ids, changed))
        differs = (h - other).abs().amax((0, 2)) > 1e-9
        assert differs[reach : reach + 10].any() and not differs[:reach].any()


def write_lines(path: Path, lines: int, seed: int) -> Path:
    """Lines whose class one word decides, wherever it stands."""
    rng, rows = random.Random(seed), []
    for number in range(lines):
        words = rng.choices("film she saw with them in this old house near town by our lake".split(), k=6)
        words.insert(rng.randrange(7), ("awful", "lovely")[number % 2])
        rows.append(f"{number % 2} {' '.join(words)}\n")
    path.write_text("".join(rows))
    return path


@pytest.mark.parametrize("name", ["ssa", "sdsa"])
def test_fine_tuning_an_encoder_end_to_end(tmp_path: Path, name: str) -> None:
    train, test = write_lines(tmp_path / "train.txt", 320, 1), write_lines(tmp_path / "test.txt", 60, 2)
    core = small({"name": name, "causal": False, "num_heads": 4}, num_hidden_layers=1).to_dict()
    core.pop("vocab_size")
    config = FinetuneConfig.from_dict(
        {
            "model": core,
            "data": {"train": str(train), "test": str(test), "tokenizer": "bpe:300", "max_length": 48},
            "optim": {"lr": 1e-2, "min_lr": 1e-3},
            "schedule": {"name": "cosine", "warmup": 4},
            "epochs": 4,
            "patience": 0,
            "batch_size": 16,
            "device": "cpu",
            "out": str(tmp_path / "out"),
        }
    )
    (run,) = finetune(config).runs
    assert run.test is not None and run.test["accuracy"] > 0.9, run.history
    assert run.folder is not None
    model = load_classifier(run.folder)
    assert isinstance(model, Classifier) and not model.blocks[0].mixer.causal
    ids, valid = torch.randint(250, (3, 20)), torch.ones(3, 20, dtype=torch.bool)
    valid[1, :6] = valid[2, 15:] = False
    other = AutoModelForSequenceClassification.from_pretrained(run.folder)
    with torch.no_grad():
        scores = model.classify(ids, Context(valid=valid))
        theirs = other(input_ids=ids, attention_mask=valid.long()).logits
        alone = model.classify(ids[1:2, 6:])
    torch.testing.assert_close(scores, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[1:2], alone, rtol=1e-4, atol=1e-4)
