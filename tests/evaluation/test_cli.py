"""``spikelm eval`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.evaluation.record import read
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
    record = read(report_file)
    assert record["kind"] == "eval" and list(record["results"]["models"]) == ["model"]
    report = record["results"]["models"]["model"]
    assert set(report["figures"]) == {"disjoint@64", "strided@64/32", "carried"}
    for figure in report["figures"].values():
        # An untrained model of this initialisation is almost uniform.
        assert 7 < figure["bits_per_byte"] < 9
        assert figure["tokens"] == figure["bytes"] == len(TEXT) - 1
        assert figure["stderr_bits_per_byte"] > 0
        assert figure["stderr_over"] == f"{figure['stderr_n']} blocks of at most 512 tokens"
    assert record["data"]["documents"] == 1 and len(record["data"]["sha256"]) == 64
    assert record["tokenizer_sha256"] == report["tokenizer_sha256"] == Tokenizer.bytes().sha256
    assert record["checkpoints"]["model"]["config"]["hidden_size"] == 16
    assert len(record["checkpoints"]["model"]["sha256"]) == 64
    assert record["arguments"]["length"] == 64 and record["arguments"]["data"] == str(text)
    assert record["seed"] == 0 and record["n"] == 3
    assert report["spikes"]["total"]["spiking_share"] > 0.5
    assert report["spikes"]["projections"]["blocks.0.mixer.key"]["tokens"] == len(TEXT) - 1
    assert {"torch", "spikelm", "python"} <= set(record["machine"]["versions"])
    assert "git_revision" in record["machine"]
    assert record["results"]["comparisons"] == []


def test_one_mode_and_max_bytes(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    report_file = tmp_path / "eval.json"
    words = ["--data", str(text), "--mode", "carried", "--max-bytes", "100", "--json", str(report_file)]
    assert main(["eval", str(checkpoint), *words]) == 0
    record = read(report_file)
    report = record["results"]["models"]["model"]
    assert list(report["figures"]) == ["carried"]
    assert record["data"]["bytes"] == 100 and report["figures"]["carried"]["tokens"] == 99


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
        results[name] = read(report_file)["results"]["models"]["model"]
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
        counts.append(read(report_file)["results"]["models"]["model"]["parameters"])
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
        (["--data", "TEXT", "--tasks", "piqa"], "--data and --tasks to measure on; expected one of"),
        (["--data", "TEXT", "--include", "x.json"], "--include adds results to a report"),
        (["--verify", "x.json"], "leave checkpoints and text out"),
        (["--data", "TEXT", "--mode", "none"], "mode 'none' measures nothing by itself"),
        (["--data", "TEXT", "--mode", "none", "--lengths", "16", "--chunk", "0"], "chunk is 0"),
        (["--data", "TEXT", "--lengths", "1k,x"], "length 'x'; expected positive numbers"),
        (["--data", "TEXT", "--lengths", "0"], "length '0'"),
        (
            ["--data", "TEXT", "--lengths", "1M"],
            "has 1,400 tokens and the longest of --lengths needs 1,048,577",
        ),
        (["--data", "wikitext-3"], "did you mean 'wikitext-103'?"),
        (["--data", "lambda"], "did you mean 'lambada'?"),
        (["--data", "wikitext-2#dev"], "wikitext-2 has no split 'dev'; expected one of test, valid"),
        (["--data", "books:/nowhere"], "/nowhere"),
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


def test_several_checkpoints_in_one_table(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models with different tokenizers and folders of the same name; every figure as if measured alone."""
    other_words = Tokenizer.train_bpe([TEXT], 280)
    other = save_checkpoint(
        tmp_path / "other" / "model",
        SpikeLM(ModelConfig(vocab_size=280, hidden_size=16, num_hidden_layers=1)),
        other_words,
    )
    both, alone, longer = tmp_path / "both.json", tmp_path / "alone.json", tmp_path / "longer.txt"
    assert main(["eval", str(checkpoint), str(other), "--data", str(text), "--mode", "carried"]) == 0
    assert "no interval: there are too few units, 2 blocks" in " ".join(capsys.readouterr().out.split())
    longer.write_text(TEXT * 8)
    words = ["--data", str(longer), "--length", "64"]
    assert main(["eval", str(checkpoint), str(other), *words, "--json", str(both)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "paired bootstrap over 11 blocks of 1024 bytes" in out and "other/model" in out
    assert main(["eval", str(other), *words, "--json", str(alone)]) == 0
    record, single = read(both), read(alone)["results"]["models"]["model"]
    models = record["results"]["models"]
    assert list(models) == [f"{checkpoint.parent.name}/model", "other/model"] == list(record["checkpoints"])
    assert models["other/model"] == single
    assert record["tokenizer_sha256"] is None and single["tokenizer_sha256"] == other_words.sha256
    assert record["n"] == 11
    found = record["results"]["comparisons"]
    assert [entry["figure"] for entry in found] == ["disjoint@64", "strided@64/32", "carried"]
    first, second = models.values()
    for entry in found:
        a, b = (model["figures"][entry["figure"]]["bits_per_byte"] for model in (first, second))
        assert entry["difference_bits_per_byte"] == pytest.approx(b - a, abs=1e-12)
        assert entry["low"] <= entry["difference_bits_per_byte"] <= entry["high"]
        assert (entry["level"], entry["n"], entry["units"]) == (0.95, 11, "blocks of 1024 bytes")


def test_a_checkpoint_given_twice(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(checkpoint), str(checkpoint), "--data", str(text)]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_bits_per_character_beside_bits_per_byte(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten characters of three bytes and one of one; the first one, in part, is not scored."""
    path, report_file = tmp_path / "t.txt", tmp_path / "eval.json"
    path.write_text("日" * 10 + "x", encoding="utf-8")
    words = ["--data", str(path), "--mode", "carried", "--json", str(report_file)]
    assert main(["eval", str(checkpoint), *words]) == 0
    assert "bits/character" in capsys.readouterr().out
    figure = read(report_file)["results"]["models"]["model"]["figures"]["carried"]
    assert (figure["bytes"], figure["characters"]) == (30, 10)
    assert figure["bits_per_character"] == pytest.approx(3 * figure["bits_per_byte"], rel=1e-12)


def test_without_a_tokenizer(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    assert main(["eval", str(bare), "--data", str(text)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds no tokenizer" in error and "--tokenizer" in error


def test_empty_text(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.txt"
    for content, message in (("", "holds no text"), ("x", "has nothing to score")):
        path.write_text(content)
        assert main(["eval", str(checkpoint), "--data", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_weights_that_are_not_numbers(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several models the sentence says which one."""
    model = SpikeLM(ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1))
    with torch.no_grad():
        model.head.linear.weight[7] = float("nan")
    broken = save_checkpoint(tmp_path / "broken", model, Tokenizer.bytes())
    assert main(["eval", str(checkpoint), str(broken), "--data", str(text), "--mode", "carried"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: broken: the loss is not finite at token 1" in error


def test_a_tokenizer_with_more_tokens_than_the_model(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save_checkpoint(
        tmp_path / "model",
        SpikeLM(ModelConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1)),
        Tokenizer.bytes(),
    )
    assert main(["eval", str(saved), "--data", str(text)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "but the model has 100 tokens; use the tokenizer" in error


def test_lengths_alone(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stream by length and nothing else; at the whole length it is the carried figure."""
    out = tmp_path / "eval.json"
    words = ["--data", str(text), "--lengths", f"256,{len(TEXT) - 1}", "--json", str(out)]
    assert main(["eval", str(checkpoint), *words, "--mode", "none"]) == 0
    assert "gain of carrying" in " ".join(capsys.readouterr().out.split())
    alone = read(out)["results"]
    assert alone["models"]["model"]["figures"] == {} and alone["comparisons"] == []
    assert main(["eval", str(checkpoint), *words, "--mode", "carried"]) == 0
    both = read(out)["results"]
    assert both["lengths"] == alone["lengths"]
    last = both["lengths"]["model"]["points"][-1]
    figure = both["models"]["model"]["figures"]["carried"]
    assert last["tokens"] == figure["tokens"] and last["bytes"] == figure["bytes"]
    assert last["bits_per_byte"] == pytest.approx(figure["bits_per_byte"], rel=1e-6)


def test_loss_by_position_is_in_the_record(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Its bins hold every token; carried state has one bin per power of two up to the text's length."""
    out = tmp_path / "eval.json"
    assert main(["eval", str(checkpoint), "--data", str(text), "--length", "64", "--json", str(out)]) == 0
    entry = read(out)["results"]["models"]["model"]
    curve, figure = entry["by_position"], entry["figures"]["carried"]
    assert entry["by_position_over"] == "carried"
    assert [(b["from"], b["tokens"], b["nats_per_token"]) for b in curve] == [
        (b["from"], b["tokens"], pytest.approx(b["nats_per_token"], rel=1e-12)) for b in figure["by_context"]
    ]
    assert sum(b["tokens"] for b in curve) == figure["tokens"]
    assert curve[-1]["n"] == 1 and curve[-1]["stderr"] is None  # 376 tokens, one block
