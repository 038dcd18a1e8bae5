"""``spikelm convert`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spikelm.checkpoint import load_model, load_tokenizer
from spikelm.cli import main
from spikelm.tokenizer import Tokenizer


@pytest.fixture
def file(tmp_path: Path, published: SimpleNamespace) -> Path:
    path = tmp_path / "model.pth"
    torch.save(published.weights(vocab=256), path)
    return path


@pytest.mark.parametrize("binary", [True, False])
def test_spikegpt_through_the_checkpoint(tmp_path: Path, published: SimpleNamespace, binary: bool) -> None:
    """Published file -> command -> folder -> model: the logits of the equations, forward and step."""
    weights = published.weights()
    torch.save(weights, tmp_path / "model.pth")
    out, report = tmp_path / "out", tmp_path / "report.json"
    option = "--binary-embedding" if binary else "--dense-embedding"
    words = [str(tmp_path / "model.pth"), str(out), option, "--json", str(report)]
    assert main(["convert", "spikegpt", *words]) == 0
    tokens = torch.randint(0, 20, (30,), generator=torch.Generator().manual_seed(2))
    expected, _ = published.logits(weights, tokens.tolist(), binary=binary)
    model = load_model(out, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0][0], expected, atol=1e-10, rtol=0)
        state = None
        for t, token in enumerate(tokens):
            logits, state = model(token[None], state)
            torch.testing.assert_close(logits[0], expected[t], atol=1e-10, rtol=0)
    written = json.loads(report.read_text())
    assert written["parameters"] == sum(value.numel() for value in weights.values())
    assert written["config"] == model.config.to_dict()


def test_rwkv4_keeps_the_tokenizer(tmp_path: Path, file: Path) -> None:
    assert main(["convert", "rwkv4", str(file), str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert load_tokenizer(tmp_path / "out").sha256 == Tokenizer.bytes().sha256
    assert load_model(tmp_path / "out").config.neuron["name"] == "none"


def test_eval_of_a_converted_checkpoint(tmp_path: Path, file: Path) -> None:
    assert main(["convert", "rwkv4", str(file), str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    (tmp_path / "t.txt").write_text("hello world")
    words = ["--data", str(tmp_path / "t.txt"), "--json", str(tmp_path / "r.json")]
    assert main(["eval", str(tmp_path / "out"), *words]) == 0
    models = json.loads((tmp_path / "r.json").read_text())["results"]["models"]
    assert models["out"]["figures"]["carried"]["tokens"] == 10


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *parts: str) -> None:
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in parts:
        assert part in error, error


def test_bad_input(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], published: SimpleNamespace
) -> None:
    out = str(tmp_path / "out")
    refused(capsys, ["spikegpt", str(file), out], "--binary-embedding", "--dense-embedding")
    refused(capsys, ["spikegpt", str(tmp_path / "absent.pth"), out, "--dense-embedding"], "absent.pth")
    refused(capsys, ["rwkv4", str(file), str(file)], "is a file")
    for command in (["rwkv4"], ["spikegpt", "--dense-embedding"]):
        refused(capsys, [*command, str(tmp_path), out], f"{tmp_path} is a folder; expected a file")
    refused(capsys, ["rwkv5", str(file), out], "rwkv5")
    torch.save(published.weights(vocab=20), tmp_path / "small.pth")
    refused(capsys, ["rwkv4", str(tmp_path / "small.pth"), out, "--tokenizer", "bytes"], "256", "20")
    assert not Path(out).exists()


def test_overwrite_is_careful(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", "rwkv4", str(file), str(out)]) == 0
    refused(capsys, ["rwkv4", str(file), str(out)], "--overwrite")
    assert main(["convert", "rwkv4", str(file), str(out), "--overwrite"]) == 0
    refused(capsys, ["rwkv4", str(file), str(tmp_path), "--overwrite"], "not a checkpoint folder")
    assert file.exists()
    inside = out / "weights.pth"
    inside.write_bytes(file.read_bytes())
    refused(capsys, ["rwkv4", str(inside), str(out), "--overwrite"], "lies inside")
    assert inside.exists()


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("spikegpt", "rwkv4"):
        assert main(["convert", name, "--help"]) == 0
        assert "Example" in capsys.readouterr().out
