"""A model that runs expanded over micro-steps is the model that runs collapsed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spikelm import presets
from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.codings import build_coding
from spikelm.codings.meter import CountMeter
from spikelm.config import ModelConfig
from spikelm.errors import CodingError
from spikelm.model import SpikeLM
from spikelm.neurons import build_neuron
from spikelm.projection import Projection
from spikelm.recurrence import Context
from spikelm.tokenizer import Tokenizer

NANO = [name for name in presets.names("models") if "nano" in name]
SIGNED = ["ternary", "bidirectional", "twos_complement"]


def random_model(config: ModelConfig) -> SpikeLM:
    """Double precision, and weights of which none is zero."""
    torch.manual_seed(3)
    model = SpikeLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", NANO)
def test_nano_presets(name: str) -> None:
    """Every nano preset, with ``adaptive`` before its projections (before the head where it spikes after)."""
    spiking = {"name": "adaptive", "k": 3.0}
    probe = ModelConfig.from_yaml(name)
    small = {"num_hidden_layers": max(2, len(probe.layers)), "vocab_size": 64}
    if probe.placement == "before":
        small |= {"neuron": spiking, "neuron_overrides": {}, "head_neuron": spiking}
    else:
        small |= {"head_neuron": spiking}
    tokens = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = random_model(ModelConfig.from_yaml(name, **small, **tokens))
    tokens = torch.randint(0, 64, (2, 9))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :2] = False
    with torch.no_grad():
        start = model.init_state(2, max_len=10)
        collapsed, state = model(tokens, start, Context(valid=valid))
        for coding in map(build_coding, SIGNED):
            meter = CountMeter()
            expanded, after = model(tokens, start, Context(valid=valid, coding=coding, meter=meter))
            torch.testing.assert_close(expanded, collapsed, atol=1e-10, rtol=0)
            assert meter.histograms and meter.total_histogram().needed > 1
        step, _ = model(tokens[:, 0], after, Context(coding=coding))
        torch.testing.assert_close(step, model(tokens[:, 0], state)[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("group_size", [None, 128, 40])
@pytest.mark.parametrize("name", ["spikegpt-nano-sd", "spikingbrain-moe-nano"])
def test_int8_weights_give_the_same_bits(name: str, group_size: int | None) -> None:
    """Integer sums are added before they are scaled: expanded is collapsed to the bit, in float32."""
    probe = ModelConfig.from_yaml(name)
    weights = {"name": "int8", "group_size": group_size}
    spiking = {"name": "adaptive", "k": 3.0}
    fields = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields |= {"num_hidden_layers": max(2, len(probe.layers)), "vocab_size": 64, "initializer_range": 0.1}
    fields |= {"neuron": spiking, "head_neuron": spiking, "neuron_overrides": {}, "weights": weights}
    fields |= {"weight_overrides": {"head": weights}, "tie_word_embeddings": False}
    model = SpikeLM(ModelConfig.from_yaml(name, **fields)).eval()
    tokens = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        collapsed, _ = model(tokens)
        assert collapsed.std() > 0.01
        for coding in map(build_coding, SIGNED):
            expanded, _ = model(tokens, None, Context(coding=coding))
            assert torch.equal(expanded, collapsed)


def test_one_product_per_micro_step() -> None:
    """The weights see events of the alphabet, and as many products as the window has micro-steps."""
    projection = Projection(8, 4, build_neuron({"name": "adaptive", "k": 3.0}, 8)).double()
    seen: list[torch.Tensor] = []
    projection.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        counts, _, _ = projection.neuron.encode(x, {}, Context())
        for name in SIGNED:
            seen.clear()
            coding = build_coding(name)
            projection(x, {}, Context(coding=coding))
            assert len(seen) == coding.steps(int(counts.abs().max()))
            assert set(torch.cat(seen).unique().tolist()) <= set(coding.alphabet)


@pytest.mark.parametrize("neuron", ["none", "lif", "heaviside"])
def test_dense_and_binary_inputs_stay_one_product(neuron: str) -> None:
    projection = Projection(8, 4, build_neuron({"name": neuron}, 8)).double()
    calls: list[int] = []
    projection.linear.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    plain, _ = projection(x)
    expanded, _ = projection(x, None, Context(coding=build_coding("ternary")))
    assert torch.equal(plain, expanded) and len(calls) == 2


def test_refusals() -> None:
    projection = Projection(8, 4, build_neuron({"name": "adaptive"}, 8))
    x = torch.randn(1, 5, 8)
    with torch.no_grad(), pytest.raises(CodingError, match="choose ternary"):
        projection(x, None, Context(coding=build_coding("bitwise")))
    with pytest.raises(CodingError, match="no_grad"):
        projection(x.requires_grad_(), None, Context(coding=build_coding("ternary")))
    with torch.no_grad():  # unsigned codings do where no count is negative
        same, _ = projection(x.abs(), None, Context(coding=build_coding("bitwise")))
        torch.testing.assert_close(same, projection(x.abs())[0])


def test_eval_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2)
    model = SpikeLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    checkpoint = save_checkpoint(tmp_path / "model", model, Tokenizer.bytes())
    (tmp_path / "t.txt").write_text("Spikes are rare; silence is cheap. " * 9)
    options = ["--data", str(tmp_path / "t.txt"), "--mode", "carried", "--dtype", "float64"]
    reports = []
    for words in ([], ["--coding", "bidirectional"], ["--coding", "ternary"]):
        file = tmp_path / "r.json"
        assert main(["eval", str(checkpoint), *options, *words, "--json", str(file)]) == 0
        record = json.loads(file.read_text())
        assert record["arguments"]["coding"] == (words[1] if words else None)
        reports.append(record["results"]["models"]["model"])
    plain, *expanded = reports
    out = capsys.readouterr().out
    assert "no code for negative counts" in out and "twos_complement" in out
    for report in expanded:
        assert report["figures"]["carried"]["nats"] == pytest.approx(
            plain["figures"]["carried"]["nats"], abs=1e-8
        )
        codings = report["spikes"]["projections"]["blocks.0.mixer.key"]["codings"]
        silent = plain["spikes"]["projections"]["blocks.0.mixer.key"]["silent"]
        assert 0 < silent < codings["bidirectional"]["exact"]["sparsity"] < 1
        assert report["spikes"]["codings"]["ternary"]["exact"]["events"] > 0
    assert "codings" not in plain["spikes"]
    assert main(["eval", str(checkpoint), *options, "--coding", "binary"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "choose ternary, bidirectional or twos_complement" in error
    assert main(["eval", str(checkpoint), *options, "--coding", "morse"]) == 2
    assert "unknown coding 'morse'" in capsys.readouterr().err
    assert main(["eval", str(checkpoint), *options, "--coding", "ternary", "--twin"]) == 0
    assert "nothing was expanded" in capsys.readouterr().err
