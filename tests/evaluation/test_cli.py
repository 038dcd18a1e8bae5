"""``spikelm eval`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

TEXT = "Spikes are rare; silence is cheap. " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2)
    return save_checkpoint(tmp_path_factory.mktemp("c") / "model", SpikeLM(config), Tokenizer.bytes())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_table_and_json(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file = tmp_path / "eval.json"
    words = ["--data", str(text), "--length", "64", "--stride", "32", "--json", str(report_file)]
    assert main(["eval", str(checkpoint), *words]) == 0
    out = capsys.readouterr().out
    for label in ("disjoint@64", "strided@64/32", "carried"):
        assert label in out
    assert "blocks of at most 512 tokens" in out and "not scored" in out
    assert "blocks.0.mixer.key" in out
    assert "mean |count| over all inputs" in " ".join(out.split())
    report = json.loads(report_file.read_text())
    assert set(report["figures"]) == {"disjoint@64", "strided@64/32", "carried"}
    for figure in report["figures"].values():
        # An untrained model of this initialisation is almost uniform.
        assert 7 < figure["bits_per_byte"] < 9
        assert figure["tokens"] == figure["bytes"] == len(TEXT) - 1
        assert figure["stderr_bits_per_byte"] > 0
    assert report["data"]["documents"] == 1 and len(report["data"]["sha256"]) == 64
    assert report["tokenizer_sha256"] == Tokenizer.bytes().sha256
    assert report["config"]["hidden_size"] == 16
    assert report["spikes"]["total"]["spiking_share"] > 0.5
    assert report["spikes"]["projections"]["blocks.0.mixer.key"]["tokens"] == len(TEXT) - 1
    assert {"torch", "spikelm", "python"} <= set(report["versions"])
    assert "git_revision" in report


def test_one_mode_and_max_bytes(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    report_file = tmp_path / "eval.json"
    words = ["--data", str(text), "--mode", "carried", "--max-bytes", "100", "--json", str(report_file)]
    assert main(["eval", str(checkpoint), *words]) == 0
    report = json.loads(report_file.read_text())
    assert list(report["figures"]) == ["carried"]
    assert report["data"]["bytes"] == 100 and report["figures"]["carried"]["tokens"] == 99


def test_twin_and_precision(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    results = {}
    for name, words in {
        "spiking": [],
        "twin": ["--twin"],
        "double": ["--dtype", "float64"],
        "half": ["--dtype", "bfloat16"],
    }.items():
        report_file = tmp_path / f"{name}.json"
        options = ["--data", str(text), "--mode", "carried", "--max-bytes", "300", "--json", str(report_file)]
        assert main(["eval", str(checkpoint), *options, *words]) == 0
        results[name] = json.loads(report_file.read_text())
    assert results["twin"]["spikes"]["total"]["spiking_share"] == 0
    assert results["spiking"]["spikes"]["total"]["spiking_share"] > 0
    value = {name: r["figures"]["carried"]["bits_per_byte"] for name, r in results.items()}
    assert value["double"] == pytest.approx(value["spiking"], abs=0.01)
    assert value["half"] == pytest.approx(value["spiking"], abs=0.05)


def test_a_tied_twin_stays_tied(text: Path, tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, tie_word_embeddings=True)
    saved = save_checkpoint(tmp_path / "model", SpikeLM(config), Tokenizer.bytes())
    counts = []
    for words in ([], ["--twin"]):
        report_file = tmp_path / "eval.json"
        options = ["--data", str(text), "--mode", "carried", "--max-bytes", "50", "--json", str(report_file)]
        assert main(["eval", str(saved), *options, *words]) == 0
        counts.append(json.loads(report_file.read_text())["parameters"])
    assert counts == [SpikeLM(config).num_parameters(), SpikeLM(config.twin()).num_parameters()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "/nowhere/at/all.txt"], "/nowhere/at/all.txt"),
        (["--data", "TEXT", "--mode", "quick"], "mode 'quick'"),
        (["--data", "TEXT", "--stride", "99", "--length", "8"], "stride 99"),
        (["--data", "TEXT", "--batch-size", "0"], "batch_size is 0"),
        (["--data", "TEXT", "--max-bytes", "-3"], "max-bytes is -3"),
        (["--data", "TEXT", "--dtype", "int4"], "dtype 'int4'"),
        (["--data", "TEXT", "--device", "tpu9"], "device 'tpu9'"),
        (["--data", "TEXT", "--start", "eos"], "no eos token"),
        (["--data", "TEXT", "--tokenizer", "/nowhere"], "/nowhere"),
        ([], "--data"),
    ],
)
def test_bad_input(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["eval", str(checkpoint), *(str(text) if w == "TEXT" else w for w in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_no_checkpoint(command: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(text)] if command == "eval" else []
    assert main([command, str(tmp_path / "absent"), *words]) == 2
    error = capsys.readouterr().err
    assert "absent" in error and "checkpoint folder" in error and "tokenizer" not in error


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_foreign_tokenizer_is_told(
    command: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        command,
        str(checkpoint),
        *(["--data", str(text)] if command == "eval" else ["--max-tokens", "2"]),
    ]
    assert main([*common, "--tokenizer", "bytes"]) == 0
    assert "warning" not in capsys.readouterr().err

    spec = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert main([*common, "--tokenizer", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and f"tokenizer {tmp_path} is not the one saved with" in error

    Tokenizer.train_bpe(["a b c"], 257).save(tmp_path)
    assert main([*common, "--tokenizer", str(tmp_path)]) == 2
    assert "has 257 tokens and the model only 256" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "stride"), [(64, 32), (1, 1), (4096, 512)])
def test_stride_follows_the_length(
    length: int, stride: int, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(text), "--mode", "strided", "--max-bytes", "20", "--length", str(length)]
    assert main(["eval", str(checkpoint), *words]) == 0
    assert f"strided@{length}/{stride}" in capsys.readouterr().out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert "Example" in capsys.readouterr().out
