"""``spikelm tokenizer``: training, describing, refusing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikelm.cli import main
from spikelm.tokenizer import Tokenizer

# --- the command ------------------------------------------------------------------------------------------


def test_command_trains_and_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. été " * 200, encoding="utf-8")
    out, source = tmp_path / "new" / "tokenizer", str(tmp_path / "text.txt")
    words = ["tokenizer", "train", "--data", source, "--vocab-size", "265", "--json", "-", str(out)]
    assert main(words) == 0
    trained = json.loads(capsys.readouterr().out)
    again = Tokenizer.load(out)
    assert trained["sha256"] == again.sha256 and trained["vocab_size"] == again.vocab_size == 265
    assert trained["bytes_per_token"] > 1.5 and trained["eos_id"] == 0
    assert main(["tokenizer", "info", str(out), "--text", "the cat", "--data", source]) == 0
    shown = capsys.readouterr().out
    assert again.sha256 in shown and "'the'" in shown and f"{trained['bytes_per_token']:.3f}" in shown


def test_command_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("abcd " * 50)
    words = ["tokenizer", "train", "--data", str(tmp_path / "text.txt"), str(tmp_path / "out")]
    assert main([*words, "--vocab-size", "300", "--special-token", "<a>", "--special-token", "<b>"]) == 0
    assert "the text gave only" in capsys.readouterr().err
    assert Tokenizer.load(tmp_path / "out").encode("<b><a>") == [1, 0]
    assert main([*words, "--vocab-size", "256", "--no-special-tokens", "--max-bytes", "10"]) == 0
    assert "training bytes: 10 B" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "out").eos_id is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "12"], "vocab_size is 12; expected an integer of at least 257"),
        (["--vocab-size", "300", "--max-bytes", "0"], "--max-bytes is 0"),
        (["--vocab-size", "300", "--special-token", "a", "--no-special-tokens"], "not both"),
        (["--vocab-size", "300", "--special-token", ""], "not empty"),
        (["--vocab-size", "300"], "there is no data source absent"),
    ],
)
def test_command_refuses_in_one_sentence(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenizer", "train", "--data", "absent", *options, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
