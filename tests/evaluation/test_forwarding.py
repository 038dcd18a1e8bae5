"""``spikelm eval`` hands on to tasks, long contexts and reports, and verifies what they give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.evaluation.record import read
from spikelm.evaluation.verify import verify
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1)
    return save_checkpoint(tmp_path_factory.mktemp("c") / "model", SpikeLM(config), Tokenizer.bytes())


def test_long_contexts(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "long.json"
    words = ["--long-context", "mqar", "--lengths", "96", "--samples", "2", "--seed", "3"]
    assert main(["eval", str(checkpoint), *words, "--json", str(out)]) == 0
    record = read(out)
    assert record["kind"] == "long-context" and record["seed"] == 3
    (row,) = record["results"]["models"]["model"]["mqar"]
    assert (row["length"], row["n"]) == (96, 2)
    assert verify(out).reproduced
    capsys.readouterr()
    assert main(["eval", "--verify", str(out)]) == 0
    assert "reproduces" in capsys.readouterr().out


def test_an_unknown_task_or_kind(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, name in ((["--tasks", "piqaa"], "piqaa"), (["--long-context", "needles"], "needles")):
        assert main(["eval", str(checkpoint), *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and name in captured.err


def test_the_ledger_is_verified(checkpoint: Path, tmp_path: Path) -> None:
    """Measured times aside, every count of spikelm energy comes out again."""
    text, out = tmp_path / "t.txt", tmp_path / "energy.json"
    text.write_text("Spikes are rare; silence is cheap. " * 20)
    words = ["--data", str(text), "--timed", "8", "--repeats", "1", "--json", str(out)]
    assert main(["energy", str(checkpoint), *words]) == 0
    verdict = verify(out)
    assert verdict.reproduced and verdict.compared > 100


def test_a_report_of_new_and_earlier_results(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, long, out = tmp_path / "t.txt", tmp_path / "long.json", tmp_path / "report"
    text.write_text("Spikes are rare; silence is cheap. " * 40)
    words = ["--long-context", "mqar", "--lengths", "96", "--samples", "2", "--json", str(long)]
    assert main(["eval", str(checkpoint), *words]) == 0
    words = ["--data", str(text), "--mode", "carried", "--lengths", "128,512", "--report", str(out)]
    assert main(["eval", str(checkpoint), *words, "--include", str(long)]) == 0
    assert f"report: {out / 'report.html'}" in "".join(capsys.readouterr().err.splitlines())
    page = (out / "report.md").read_text()
    for part in ("carried", "mqar", "Loss by position", "Perplexity by length"):
        assert part in page
    # Of earlier results alone.
    capsys.readouterr()
    assert main(["eval", "--report", str(tmp_path / "second"), "--include", str(long)]) == 0
    assert "mqar" in (tmp_path / "second" / "report.md").read_text()
    assert main(["eval", "--report", str(tmp_path / "third")]) == 2
    assert "there is nothing to report" in capsys.readouterr().err
    # A file that is not there is told of before anything is measured.
    assert main(["eval", str(checkpoint), *words, "--include", str(tmp_path / "absent.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "absent.json" in captured.err
