"""``spikelm energy`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.cli.energy import rerun
from spikelm.config import ModelConfig
from spikelm.evaluation.job import labels
from spikelm.evaluation.record import read
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

TEXT = "Spikes are rare; silence is cheap. " * 12


def save(folder: Path, **options: object) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, **options)  # type: ignore[arg-type]
    return save_checkpoint(folder, SpikeLM(config), Tokenizer.bytes())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("c") / "model", weights={"name": "int8", "group_size": 8})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_tables_record_and_rerun(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = save(tmp_path / "model", neuron={"name": "none"})
    out = tmp_path / "energy.json"
    words = ["--data", str(text), "--batch", "4", "--on-chip", "0.01", "--timed", "8", "--repeats", "2"]
    assert main(["energy", str(checkpoint), str(twin), *words, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("operations per token", "ESTIMATED energy", "MEASURED", "spikes, bidirectional", "ternary"):
        assert word in shown
    assert "beside each other" in shown and "Yan et al." in shown
    record = read(out)
    assert record["kind"] == "energy" and record["n"] == len(TEXT) - 1 and record["seed"] is None
    assert record["tokenizer_sha256"] == Tokenizer.bytes().sha256
    models = record["results"]["models"]
    # As spikelm eval names them, so that a report can join both.
    assert list(models) == list(labels([str(checkpoint), str(twin)])) == list(record["checkpoints"])
    assert all(label.endswith("/model") for label in models)
    first, second = models.values()
    assert first["operations"]["total"]["accumulates"] > 0 == second["operations"]["total"]["accumulates"]
    assert second["operations"]["codings"] == {} and second["bit_budget"] == {}
    assert {"batch_1", "batch_4", "rule"} == set(first["bytes"])
    assert set(first["energy"]) == set(record["results"]["prices"]["tables"])
    for key in ("dense_macs", "effective_macs", "accumulates"):
        assert isinstance(first["operations"]["total"][key], float)
    assert first["bytes"]["batch_1"]["dram_per_token"] > 0 and first["measured"]["seconds_per_token"] > 0
    again = rerun(record["arguments"])
    for label, model in again["results"]["models"].items():
        for volatile in ("measured", "verdict"):
            model.pop(volatile), models[label].pop(volatile)
    assert json.loads(json.dumps(again["results"])) == record["results"]


def test_arguments_of_a_record_are_those_of_the_command(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    import inspect

    from spikelm.cli.energy import energy

    out = tmp_path / "energy.json"
    assert main(["energy", str(checkpoint), "--data", str(text), "--timed", "0", "--json", str(out)]) == 0
    assert set(inspect.signature(energy).parameters) == {*read(out)["arguments"], "json_file"}


def test_another_table_is_shown(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(text), "--timed", "0", "--prices", "jouppi-7nm", "--on-chip", "64"]
    assert main(["energy", str(checkpoint), *words]) == 0
    shown = capsys.readouterr().out
    assert "prices jouppi-7nm" in shown and "The whole model stays on the chip" in shown
    assert "Nothing was timed" in shown


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["energy", "--help"]) == 0
    assert "Example: spikelm energy" in " ".join(capsys.readouterr().out.split())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["energy", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("spikelm: error: ")
    return lines[0]


def test_bad_input(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(text)]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "holds no text" in refused(capsys, str(checkpoint), "--data", str(empty))
    assert "none.txt" in refused(capsys, str(checkpoint), "--data", str(tmp_path / "none.txt"))
    assert "holds no config.json" in refused(capsys, str(tmp_path / "nowhere"), *data)
    assert "unknown price table 'jouppi'" in refused(capsys, str(checkpoint), *data, "--prices", "jouppi")
    assert "on-chip is 0" in refused(capsys, str(checkpoint), *data, "--on-chip", "0")
    assert "on-chip is nan" in refused(capsys, str(checkpoint), *data, "--on-chip", "nan")
    assert "batch is 0" in refused(capsys, str(checkpoint), *data, "--batch", "0")
    assert "length is 0" in refused(capsys, str(checkpoint), *data, "--length", "0")
    assert "too few for a batch of 4096" in refused(capsys, str(checkpoint), *data, "--batch", "4096")
    assert "max-bytes is 0" in refused(capsys, str(checkpoint), *data, "--max-bytes", "0")
    assert "cannot be used here" in refused(capsys, str(checkpoint), *data, "--device", "nowhere")


def test_a_vocabulary_that_does_not_fit(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    small = SpikeLM(ModelConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    folder = save_checkpoint(tmp_path / "small", small, Tokenizer.bytes())
    assert "the model has 64 tokens" in refused(capsys, str(folder), "--data", str(text))


def test_no_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(tmp_path / "bare", SpikeLM(ModelConfig(hidden_size=16, num_hidden_layers=1)))
    assert "tokenizer" in refused(capsys, str(folder), "--data", str(text))


@pytest.mark.parametrize("neuron", ["none", "adaptive"])
def test_weights_that_are_not_finite(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], neuron: str
) -> None:
    model = SpikeLM(ModelConfig(hidden_size=16, num_hidden_layers=1, neuron={"name": neuron}))
    with torch.no_grad():
        model.blocks[0].mixer.mix_k.fill_(torch.nan)
    folder = save_checkpoint(tmp_path / "nan", model, Tokenizer.bytes())
    assert (
        "not finite" in (sentence := refused(capsys, str(folder), "--data", str(text))) or "nan" in sentence
    )


def test_a_standard_set_by_name(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    """The text is that of spikelm eval: by the hash of what was read."""
    data = {}
    for command, words in (("energy", ["--timed", "8", "--repeats", "2"]), ("eval", ["--mode", "carried"])):
        out = tmp_path / f"{command}.json"
        asked = [command, str(checkpoint), "--data", "wikitext-2#valid", "--max-bytes", "4000", *words]
        assert main([*asked, "--json", str(out)]) == 0
        data[command] = read(out)["data"]
    assert data["energy"]["sha256"] == data["eval"]["sha256"]
    assert data["energy"]["bytes"] == data["eval"]["bytes"] > 0
