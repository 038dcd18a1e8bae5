"""Token stores: what is on disk, the cache, damage, shards of any size."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spikelm.data import TokenBlocks
from spikelm.data.shards import checksum_of
from spikelm.data.store import Index, default_cache_dir, open_store, tokenise
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

from .stores import BPE, BYTES, Texts

# --- the store --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_store_holds_the_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["abc é日", "", "<|endoftext|> as text"] * 50
    store = tokenise(Texts(*texts), tokenizer, tmp_path)
    memory = TokenBlocks.from_documents(texts, tokenizer, 4)
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16
    assert np.array_equal(store.tokens, memory.tokens) and np.array_equal(store.starts, memory.starts)
    assert store.index.byte_exact and store.index.num_bytes == sum(len(text.encode()) for text in texts)
    assert np.array_equal(np.load(store.path / "00000" / "tokens.npy"), store.tokens)
    store.verify()


def test_large_vocabularies_take_four_bytes(data_dir: Path, tmp_path: Path) -> None:
    qwen = Tokenizer.load(data_dir / "tokenizers/qwen2")
    store = tokenise(Texts("Hello 日本"), qwen, tmp_path)
    assert store.tokens.dtype == np.uint32 and store.tokens[-1] == qwen.eos_id > 65536
    store.verify()


def test_source_is_read_once(tmp_path: Path) -> None:
    source, done = Texts("abc" * 10, "de"), []
    first = TokenBlocks.build(source, BYTES, 3, tmp_path, on_progress=done.append)
    second = TokenBlocks.build(source, BYTES, 5, tmp_path)
    assert source.reads == 1 and done == [30, 32]
    assert np.array_equal(first.tokens, second.tokens)
    TokenBlocks.build(source, BPE, 3, tmp_path)
    TokenBlocks.build(Texts("other text"), BYTES, 3, tmp_path)
    assert source.reads == 2 and len(list(tmp_path.iterdir())) == 3


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first text")
    assert TokenBlocks.build(path, BYTES, 3, tmp_path / "cache").num_tokens == 10
    path.write_text("another text")
    assert TokenBlocks.build(str(path), BYTES, 3, tmp_path / "cache").num_tokens == 12
    path.write_text("Another TEXT")  # of the same size: only the time of the change differs
    os.utime(path, ns=(0, 10**18))
    blocks = TokenBlocks.build(path, BYTES, 3, tmp_path / "cache")
    assert BYTES.decode(blocks.document(0)) == "Another TEXT"


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(Texts):
        def _documents(self):
            yield "abc"
            raise DataError("bad line")

    with pytest.raises(DataError, match="bad line"):
        tokenise(Failing("x"), BYTES, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tokenise(Texts("x"), BYTES, tmp_path).index.num_tokens == 1


def test_unwritable_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the token cache"):
        tokenise(Texts("abc"), BYTES, tmp_path / "file" / "cache")


def test_cache_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "tokens"
    monkeypatch.delenv("SPIKELM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "spikelm" / "tokens"


def damaged_store(tmp_path: Path) -> Path:
    path = tokenise(Texts("abc def " * 100, "ghi"), BYTES, tmp_path).path
    assert path is not None
    return path


def test_damaged_stores_name_the_file(tmp_path: Path) -> None:
    path = damaged_store(tmp_path)
    shard = path / "00000"
    tokens, index, starts = shard / "tokens.npy", path / "index.json", shard / "starts.npy"
    whole, described, begins = tokens.read_bytes(), index.read_text(), starts.read_bytes()
    for data, message in (
        (whole[:-1], r"cut off at byte 1733"),
        (whole[:64], "cut off at byte 64"),
        (b"", "cut off at byte 0"),
        (whole.replace(b"<u2", b"<i2"), "damaged between byte 0 and byte 1734"),
        (b"PK" + whole, "damaged at byte 1736; 1734 bytes were written"),
    ):
        tokens.write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            open_store(path)
        assert str(tokens) in str(caught.value)
    tokens.unlink()
    with pytest.raises(DataError, match="tokens.npy is missing"):
        open_store(path)
    tokens.write_bytes(whole)
    for data in (begins[:-8] + (5000).to_bytes(8, "little"), begins[:-8], begins + bytes(8)):
        starts.write_bytes(data)
        with pytest.raises(DataError, match="starts.npy is (damaged|cut off)"):
            open_store(path)
    starts.write_bytes(begins)
    for text, message in (
        ("{", "cannot be read"),
        ("{}", "has format None; expected 3"),
        ("[]", "does not describe"),
        ("\x00" * len(described), "cannot be read"),
        (json.dumps(json.loads(described) | {"format_version": 9}), "has format 9"),
        (json.dumps(json.loads(described) | {"more": 1}), "does not describe"),
        (json.dumps(json.loads(described) | {"num_bytes": 7}), "is damaged"),
        (json.dumps(json.loads(described) | {"shards": [1]}), "is damaged"),
    ):
        index.write_text(text)
        with pytest.raises(DataError, match=message):
            open_store(path)
    index.unlink()
    with pytest.raises(DataError, match="no token store"):
        open_store(path)


def test_damaged_cache_is_rebuilt(tmp_path: Path) -> None:
    source = Texts("abc def " * 100)
    path = tokenise(source, BYTES, tmp_path).path
    os.truncate(path / "00000" / "tokens.npy", 200)
    with pytest.warns(UserWarning, match="tokenising texts again"):
        store = tokenise(source, BYTES, tmp_path)
    store.verify()
    assert source.reads == 2 and len(list(tmp_path.iterdir())) == 1


def reseal(path: Path, **changes: Any) -> None:
    """Change an index and make its checksum fit."""
    content = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
    index = replace(Index(**content), **changes)
    path.write_text(json.dumps(asdict(replace(index, crc32=index.checksum()))))


def test_an_index_without_documents_is_rebuilt(tmp_path: Path) -> None:
    source = Texts("abc def " * 100)
    path = tokenise(source, BYTES, tmp_path).path
    reseal(path / "index.json", num_documents=0)
    with pytest.warns(UserWarning, match="0 documents.*tokenising texts again"):
        assert tokenise(source, BYTES, tmp_path).index.num_documents == 1


@pytest.mark.parametrize("name", ["00000/tokens.npy", "00000/starts.npy", "00000/index.json", "index.json"])
def test_a_damaged_byte_anywhere_is_rebuilt(name: str, tmp_path: Path) -> None:
    source = Texts("abc def " * 100, "ghi")
    whole = tokenise(source, BYTES, tmp_path)
    path = whole.path / name
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.warns(UserWarning, match="tokenising texts again"):
            again = tokenise(source, BYTES, tmp_path)
        assert np.array_equal(again.tokens, whole.tokens) and again.index == whole.index


def test_zeroed_bytes_are_found(tmp_path: Path) -> None:
    path = damaged_store(tmp_path)
    data = bytearray((path / "00000" / "tokens.npy").read_bytes())
    data[600:800] = bytes(200)
    (path / "00000" / "tokens.npy").write_bytes(data)
    with pytest.raises(DataError, match=r"tokens.npy is damaged between byte 0 and byte 1734"):
        open_store(path)


def test_large_stores_are_checked_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spikelm.data.store.CHECKED_AT_OPEN", 1000)
    monkeypatch.setattr("spikelm.data.checksums.CHUNK", 256)
    store = tokenise(Texts("abcdefgh" * 100), BYTES, tmp_path)
    data = bytearray((store.path / "00000" / "tokens.npy").read_bytes())
    data[1000] ^= 1  # token 436, in the chunk of bytes 768 to 1024
    (store.path / "00000" / "tokens.npy").write_bytes(data)
    blocks = TokenBlocks(open_store(store.path), BYTES, 16)
    for number in range(len(blocks)):
        first, last = 128 + 2 * 16 * number, 128 + 2 * 16 * (number + 1) + 1  # bytes a block reads
        if last < 768 or first >= 1024:
            assert blocks.blocks(np.array([number])).inputs.tolist()[0] == list(b"abcdefgh" * 2)
        else:
            with pytest.raises(
                DataError, match=r"tokens.npy is damaged between byte 768 and byte 1024.*dele"
            ):
                blocks.blocks(np.array([number]))
    with pytest.raises(DataError, match="damaged"):
        blocks.document(0)
    with pytest.raises(DataError, match="damaged"):
        open_store(store.path).verify()


def test_every_chunk_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikelm.data.store.CHECKED_AT_OPEN", 1000)
    monkeypatch.setattr("spikelm.data.checksums.CHUNK", 256)
    path = tokenise(Texts("abcdefgh" * 100), BYTES, tmp_path).path
    sizes: list[int] = []

    def crc32(data: Any, *rest: Any) -> int:
        sizes.append(len(data))
        return zlib.crc32(data, *rest)

    monkeypatch.setattr("spikelm.data.checksums.zlib", SimpleNamespace(crc32=crc32))
    blocks = TokenBlocks(open_store(path), BYTES, 16)
    assert sizes == [128 + 8, 256]  # the document starts, and the chunk of the header
    for _ in range(2):
        blocks.blocks(np.arange(len(blocks)))
    assert sum(sizes) == 136 + 128 + 2 * 800


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """A store whose checksums fit and whose tokens do not."""
    path = tokenise(Texts("abc def " * 100, "ghi"), BYTES, tmp_path, shard_tokens=250).path
    shard = path / "00001"
    data = bytearray((shard / "tokens.npy").read_bytes())
    data[128 + 2 * 50 : 128 + 2 * 51] = (65000).to_bytes(2, "little")
    (shard / "tokens.npy").write_bytes(data)
    content = json.loads((shard / "index.json").read_text()) | {"tokens_crc32": [zlib.crc32(data)]}
    content["crc32"] = checksum_of(content | {"crc32": 0})
    (shard / "index.json").write_text(json.dumps(content))
    checks = json.loads((path / "index.json").read_text())["shards"]
    checks[1] = content["crc32"]
    reseal(path / "index.json", shards=tuple(checks))
    store = open_store(path)
    with pytest.raises(
        DataError, match=r"00001/tokens.npy: token 65000 at position 50 \(byte 228\) is outside"
    ):
        store.verify()
    with pytest.raises(DataError, match="at position 300 is outside the vocabulary of 256"):
        blocks = TokenBlocks(store, BYTES, 7)
        blocks.blocks(np.arange(len(blocks)))
    (shard / "tokens.npy").write_bytes(data[:-2] + b"aa")
    with pytest.raises(DataError, match="00001/tokens.npy is damaged between byte 0 and byte 628"):
        open_store(path)
