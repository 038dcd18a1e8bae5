"""Tokenizers of characters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from spikelm.cli import main
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer


def test_characters_are_single_tokens_and_nothing_is_unknown(tmp_path: Path) -> None:
    made = Tokenizer.characters(["naïve café\n", "日本 ▁ naïve"], special_tokens=("<|endoftext|>",))
    assert made.vocab_size == 1 + 256 + len(set("ïé日本▁")) and made.eos_id == 0
    assert made.is_byte_level and made.dtype == np.uint16
    known = "a café: 日本\r\n\tnaïve ▁"
    assert len(made.encode(known)) == len(known)
    # Unknown ones become their bytes; what looks like a byte's name, or a special token, is text.
    for text in (known, "日本語 🎉\u2028\x00 ä", "<0x80> ## <|endoftext|>", ""):
        ids = made.encode(text, parse_special=False)
        unknown = [c for c in text if ord(c) > 127 and c not in "ïé日本▁"]
        assert len(ids) == len(text) + sum(len(c.encode()) - 1 for c in unknown)
        assert made.decode(ids) == text
        assert made.token_bytes[ids].sum() == len(text.encode())
        stream = made.decode_stream()
        assert "".join(stream.push(i) for i in ids) + stream.finish() == text
        assert np.array_equal(made.encode_array(text), np.array(ids))
    assert made.encode("<|endoftext|>") == [0]
    made.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == made.sha256 and again.encode(known) == made.encode(known)
    assert AutoTokenizer.from_pretrained(tmp_path)(known)["input_ids"] == made.encode(known)
    assert AutoTokenizer.from_pretrained(tmp_path).decode(made.encode("語 é")) == "語 é"


def test_frequent_characters_stay_when_there_is_little_room() -> None:
    texts = ["é" * 5 + "ä" * 3 + "ö"]
    made = Tokenizer.characters(texts, 258)
    assert [len(made.encode(c)) for c in "éäö"] == [1, 1, 2]
    assert Tokenizer.characters(texts, min_frequency=4).vocab_size == 257
    assert (
        Tokenizer.characters(reversed(["ä", "é", "é"])).sha256 == Tokenizer.characters(["é", "é", "ä"]).sha256
    )
    with pytest.raises(DataError, match="at least 256"):
        Tokenizer.characters(texts, 200)


def test_characters_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("café naïve " * 100, encoding="utf-8")
    command = ["tokenizer", "characters", "--data", str(tmp_path / "text.txt")]
    assert main([*command, str(tmp_path / "made"), "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["vocab_size"] == 258 and result["measured_tokens"] == 1100
    assert result["bytes_per_token"] == pytest.approx(1300 / 1100)
    capsys.readouterr()
    assert main([*command, str(tmp_path / "text.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
