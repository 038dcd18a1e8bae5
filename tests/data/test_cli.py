"""``spikelm data``: the four commands, their JSON, their refusals, Ctrl-C on a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spikelm.cli import main
from spikelm.data import TokenBlocks
from spikelm.data.statistics import QUANTILES, text_statistics, token_statistics
from spikelm.data.store import open_store
from spikelm.tokenizer import Tokenizer

TEXTS = ["abc abc bca", "cab", "abc abc bca", "", "日本\n" * 30]
BPE = Tokenizer.train_bpe(["abc abc bca cab é日 " * 30], 280)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS))
    BPE.save(tmp_path / "tokenizer")
    return path


def run(*words: object) -> dict[str, Any]:
    """The JSON result of a command that succeeds."""
    target = Path(os.environ["SPIKELM_CACHE"]).parent / "result.json"
    assert main(["data", *map(str, words), "--json", str(target)]) == 0
    return json.loads(target.read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["data", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("spikelm: error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("command", ["inspect", "stats", "tokenize", "verify"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", command, "--help"]) == 0
    assert f"Example: spikelm data {command} " in capsys.readouterr().out


def test_inspect(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("inspect", corpus, "--documents", 2)
    assert result["kind"] == "file of JSON lines" and result["fields"] == {"text": "str", "n": "int"}
    assert result["first"] == [{"bytes": 11, "text": TEXTS[0]}, {"bytes": 3, "text": "cab"}]
    assert "fields: text (str), n (int)" in capsys.readouterr().out
    assert run("inspect", corpus, "--tokenizer", "bytes")["first"][2]["tokens"] == 11
    pq.write_table(pa.table({"text": ["[b]"], "n": [1]}), tmp_path / "a.parquet")
    result = run("inspect", tmp_path / "a.parquet")
    assert result["fields"] == {"text": "string", "n": "int64"} and result["first"][0]["text"] == "[b]"
    assert "'[b]'" in capsys.readouterr().out  # text is no markup
    assert "unknown field 'txt'" in refused(capsys, "inspect", f"{tmp_path}/a.parquet#txt")
    assert "--documents is -1" in refused(capsys, "inspect", corpus, "--documents=-1")


def test_stats(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("stats", corpus, "--tokenizer", tmp_path / "tokenizer", "--workers", 1)
    sizes = [len(text.encode()) for text in TEXTS if text]
    tokens = [len(BPE.encode(text)) + 1 for text in TEXTS if text]
    assert result["text"]["lengths"] | {"quantiles": 0} == {
        "count": 4, "total": sum(sizes), "mean": sum(sizes) / 4, "shortest": 3, "longest": 210,
        "longest_document": 3, "quantiles": 0,
    }  # fmt: skip
    assert (result["text"]["duplicates"], result["text"]["duplicate_bytes"], result["text"]["lines"]) == (
        1,
        11,
        30,
    )
    counted = result["tokens"]
    assert (counted["lengths"]["total"], counted["lengths"]["longest"]) == (sum(tokens), max(tokens))
    assert counted["duplicates"] == 1 and counted["bytes_per_token"] == sum(sizes) / sum(tokens)
    ids = [i for text in TEXTS if text for i in [*BPE.encode(text), BPE.eos_id]]
    assert counted["used"] == len(set(ids)) and counted["vocab_size"] == BPE.vocab_size
    first = counted["frequent"][0]
    assert first["count"] == max(map(ids.count, set(ids))) == ids.count(first["id"])
    assert "tokens used" in capsys.readouterr().out
    assert "tokens" not in run("stats", corpus)
    assert len([p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]) == 1


def test_quantiles_are_lengths_that_occur(tmp_path: Path) -> None:
    texts = ["x" * size for size in range(1, 201)]
    found = text_statistics(texts).lengths
    assert list(found.quantiles) == list(QUANTILES) and list(found.quantiles.values()) == [
        2,
        10,
        50,
        100,
        150,
        190,
        198,
    ]
    store = TokenBlocks.from_documents(texts, Tokenizer.bytes(), 1).store
    assert token_statistics(store).lengths == found


def test_tokenize_and_train_from_the_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "tokenize",
        corpus,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        tmp_path / "out",
        "--shard-tokens",
        20,
    )
    result = run(*words)
    assert result["documents"] == 4 and result["shards"] == -(-result["tokens"] // 20)
    shown = capsys.readouterr().out
    assert f"{result['tokens']:,} tokens in 4 documents" in shown and "out: " in shown
    before = (tmp_path / "out" / "index.json").stat().st_mtime_ns
    assert run(*words)["tokens_sha256"] == result["tokens_sha256"]
    assert (tmp_path / "out" / "index.json").stat().st_mtime_ns == before
    blocks = TokenBlocks.build(tmp_path / "out", BPE, 8)
    assert blocks.num_tokens == result["tokens"] and BPE.decode(blocks.document(1)) == "cab"
    shown = run("inspect", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer", "--documents", 1)
    assert shown["first"][0]["text"] == TEXTS[0] and shown["made_from"] == f"{corpus}#text"
    assert run("stats", tmp_path / "out")["tokens"]["duplicates"] == 1
    assert "not with Tokenizer(the byte tokenizer" in refused(
        capsys, "stats", tmp_path / "out", "--tokenizer", "bytes"
    )
    other = ("tokenize", corpus, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert "already holds" in refused(capsys, *other)
    assert "there is no tokenizer none" in refused(
        capsys, "tokenize", corpus, "--tokenizer", "none", "--out", "x"
    )
    assert "shard_tokens is 0" in refused(
        capsys, "tokenize", corpus, "--tokenizer", "bytes", "--out", tmp_path / "new", "--shard-tokens", 0
    )
    assert "workers is -1" in refused(
        capsys,
        "tokenize",
        corpus,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        tmp_path / "new",
        "--workers=-1",
    )
    assert not (tmp_path / "new").exists()


def test_verify(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    run("tokenize", corpus, "--tokenizer", "bytes", "--out", tmp_path / "out", "--shard-tokens", 100)
    result = run("verify", tmp_path / "out")
    assert result["verified"] and (result["tokens"], result["documents"], result["shards"]) == (235, 4, 3)
    assert "235 tokens in 3 shards: everything is as it was written" in capsys.readouterr().out
    assert run("verify", corpus)["bytes"] == 235
    assert run("verify", corpus, "--tokenizer", "bytes")["tokens"] == 235
    # Shards too large to be read when they are opened.
    monkeypatch.setattr("spikelm.data.store.CHECKED_AT_OPEN", 10)
    monkeypatch.setattr("spikelm.data.checksums.CHUNK", 128)
    run("tokenize", corpus, "--tokenizer", "bytes", "--out", tmp_path / "large", "--shard-tokens", 100)
    file = tmp_path / "large" / "00002" / "tokens.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    open_store(tmp_path / "large")
    message = refused(capsys, "verify", tmp_path / "large")
    assert "00002/tokens.npy is damaged between byte 128 and byte 198" in message
    corpus.write_text(corpus.read_text() + "\n{")
    assert f"{corpus} line 6 (byte" in refused(capsys, "verify", corpus)
    np.array(list(b"abcd"), "<u2").tofile(tmp_path / "b.bin")
    assert "b.idx is missing" in refused(capsys, "verify", tmp_path / "b.bin")


def test_token_files_want_a_tokenizer(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.array(list(b"abcd"), "<u2").tofile(tmp_path / "b.bin")
    numbers = np.array([1, 2], "<u8").tobytes() + np.array([4], "<i4").tobytes()
    (tmp_path / "b.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + np.array([1], "<u8").tobytes()
        + b"\x08"
        + numbers
        + np.array([0, 0, 1], "<i8").tobytes()
    )
    assert "name it with --tokenizer" in refused(capsys, "verify", tmp_path / "b.bin")
    assert run("verify", tmp_path / "b.bin", "--tokenizer", "bytes")["tokens"] == 4
    assert run("inspect", tmp_path / "b.idx", "--tokenizer", "bytes")["first"][0]["text"] == "abcd"


def test_ctrl_c_leaves_shards_that_are_continued(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i} " * 60}) for i in range(8000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    BPE.save(tmp_path / "tokenizer")
    words = ["tokenize", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "tokenizer"]
    words += ["--out", tmp_path / "out", "--workers", "1", "--shard-tokens", "100000"]
    command = [sys.executable, "-m", "spikelm", "data", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "00000").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and "give the same command again to go on" in err and "Traceback" not in err
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "index.json" not in names and not any(name.startswith(".") for name in names)
    first = (tmp_path / "out" / "00000").stat().st_mtime_ns
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "00000").stat().st_mtime_ns == first
    store = open_store(tmp_path / "out")
    assert store.index.num_documents == 8000 and BPE.decode(store.read(0, 100)).startswith("document 0 ")
