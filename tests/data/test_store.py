"""Token stores: what is on disk, the cache, damage, shards of any size."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data import TokenBlocks, open_source
from spikelm.data.shards import checksum_of
from spikelm.data.source import Source
from spikelm.data.store import Index, default_cache_dir, open_store, tokenise, tokenise_into
from spikelm.data.writing import Plan
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(["abc abc bca cab é日 " * 30], 280)


class Texts(Source):
    """Documents in memory with a fingerprint of their own; counts how often it is read."""

    def __init__(self, *texts: str) -> None:
        super().__init__("texts")
        self.texts, self.reads = texts, 0

    def _documents(self):
        self.reads += 1
        yield from self.texts

    def fingerprint(self) -> str:
        return repr(self.texts)


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


# --- shards -----------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.text(alphabet="abc é日\n", max_size=16), min_size=1, max_size=6).filter(any),
    st.integers(2, 30),
    st.integers(0, 100),
    st.sampled_from([BYTES, BPE]),
)
def test_shards_of_any_size_read_as_one(texts: list[str], size: int, stop: int, tokenizer: Tokenizer) -> None:
    """Also when the source fails after ``stop`` characters and the next run goes on."""

    class Failing(Texts):
        def _documents(self):
            left = stop
            for text in self.texts:
                left -= len(text)
                if left < 0:
                    raise DataError("the connection was cut")
                yield text

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        memory = TokenBlocks.from_documents(texts, tokenizer, 1).store if sum(map(len, texts)) > 1 else None
        store = tokenise(Texts(*texts), tokenizer, root / "a", shard_tokens=size)
        whole = np.concatenate(store.files.arrays())
        assert (
            all(len(a) == size for a in store.files.arrays()[:-1]) and len(store.files.arrays()[-1]) <= size
        )
        assert memory is None or (
            np.array_equal(whole, memory.tokens)
            and np.array_equal(store.starts, memory.starts)
            and store.index.num_bytes == memory.index.num_bytes
            and store.index.tokens_sha256 == memory.index.tokens_sha256
        )
        assert store.index.byte_exact
        for begin in range(0, len(whole), 3):
            for end in (begin, begin + 1, begin + size, begin + 2 * size + 1, len(whole)):
                assert np.array_equal(store.read(begin, end), whole[begin:end])
        assert np.array_equal(store.tokens[1::2], whole[1::2]) and store.tokens[-1] == whole[-1]
        assert np.array_equal(store.tokens[::-1], whole[::-1])
        store.verify()
        try:
            tokenise(Failing(*texts), tokenizer, root / "b", shard_tokens=size)
        except DataError as error:
            assert "was cut" in str(error) or "holds no text" in str(error)
        again = tokenise(Texts(*texts), tokenizer, root / "b", shard_tokens=size)
        assert files_of(again.path) == files_of(store.path) and again.index == store.index


def test_an_interrupted_run_goes_on_after_the_last_whole_shard(tmp_path: Path) -> None:
    texts = [f"document {i} " * (i % 7) for i in range(60)]

    class Failing(Texts):
        def _documents(self):
            yield from self.texts[:40]
            raise DataError("the connection was cut")

    with pytest.raises(DataError, match="was cut"):
        tokenise(Failing(*texts), BPE, tmp_path, shard_tokens=100)
    (folder,) = tmp_path.iterdir()
    first = {p.name for p in folder.iterdir()}
    assert len(first) > 5 and "index.json" not in first
    times = {name: (folder / name).stat().st_mtime_ns for name in first - {"plan.json"}}
    done: list[int] = []
    # Another size of shards: the run goes on with the size it began with.
    store = tokenise(Texts(*texts), BPE, tmp_path, done.append, shard_tokens=5000)
    assert store.index.shard_tokens == 100
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert done[0] > 100 and done[-1] == store.index.num_bytes == sum(map(len, texts))
    whole = tokenise(Texts(*texts), BPE, tmp_path / "whole", shard_tokens=100)
    assert files_of(whole.path) == files_of(store.path)
    # A damaged shard in an unfinished store: it and what follows are made again.
    (folder / "index.json").unlink()
    (folder / "plan.json").write_text(json.dumps(asdict(Plan.of(Texts(*texts), BPE, 100))))
    data = bytearray((folder / "00003" / "tokens.npy").read_bytes())
    data[150] ^= 1
    (folder / "00003" / "tokens.npy").write_bytes(data)
    again = tokenise(Texts(*texts), BPE, tmp_path)
    assert files_of(whole.path) == files_of(again.path)
    assert times["00002"] == (folder / "00002").stat().st_mtime_ns
    assert times["00003"] != (folder / "00003").stat().st_mtime_ns


def test_a_source_that_became_shorter_is_refused(tmp_path: Path) -> None:
    class Shrinking(Texts):
        def fingerprint(self) -> str:
            return "same"

    class Cut(Shrinking):
        def _documents(self):
            yield from self.texts
            raise DataError("cut")

    with pytest.raises(DataError, match="cut"):
        tokenise(Cut("abcdef" * 50), BYTES, tmp_path, shard_tokens=70)
    with pytest.raises(DataError, match="tokens before the last whole shard.*delete that folder"):
        tokenise(Shrinking("abcdef" * 30), BYTES, tmp_path, shard_tokens=70)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    class Growing(Texts):
        def _documents(self):
            yield from self.texts
            self.texts = ("abc", "de")

    source = Growing("abc")
    with pytest.raises(DataError, match="texts changed while it was tokenised"):
        tokenise(source, BYTES, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tokenise(source, BYTES, tmp_path).index.num_documents == 2


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    path = tokenise(Texts("abc def " * 100), BYTES, tmp_path, shard_tokens=300).path
    kept = tmp_path / "kept"
    (path / "00001").rename(kept)
    with pytest.raises(DataError, match="00001 is missing: shard 1 of 3"):
        open_store(path)
    other = tokenise(Texts("xyz uvw " * 100), BYTES, tmp_path, shard_tokens=300).path
    shutil.copytree(other / "00001", path / "00001")
    with pytest.raises(DataError, match="00001 is a shard of another store"):
        open_store(path)
    shutil.rmtree(path / "00001")
    shutil.copytree(path / "00000", path / "00001")
    with pytest.raises(DataError, match="is of shard 0 where shard 1 was expected"):
        open_store(path)
    shutil.rmtree(path / "00000")
    with pytest.raises(DataError, match="00000 is missing: shard 0 of 3"):
        open_source(path)
    shutil.rmtree(path / "00001")
    (path / "index.json").write_text('{"format_version": 2, "tokens_sha256": ""}')
    with pytest.raises(DataError, match="has format 2; expected 3"):
        open_source(path)


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
def test_sizes_of_shards_that_are_none(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard_tokens is"):
        tokenise(Texts("abc"), BYTES, tmp_path, shard_tokens=size)


# --- a folder of one's own --------------------------------------------------------------------------------


def test_a_store_in_a_folder_is_a_source(tmp_path: Path) -> None:
    texts = Texts("abc abc bca " * 30, "cab")
    made = tokenise_into(tmp_path / "out", texts, BPE, shard_tokens=50)
    again = tokenise_into(tmp_path / "out", texts, BPE, shard_tokens=50)
    assert texts.reads == 1 and again.index == made.index
    assert np.array_equal(tokenise(texts, BPE, tmp_path / "cache").tokens, np.asarray(made.tokens))
    opened = TokenBlocks.build(str(tmp_path / "out"), BPE, 16, tmp_path / "unused")
    assert opened.num_tokens == made.index.num_tokens and not (tmp_path / "unused").exists()
    assert opened.store.index.tokens_sha256 == made.index.tokens_sha256
    with pytest.raises(DataError, match=r"out was written with tokenizer [0-9a-f]{12}.*not"):
        TokenBlocks.build(tmp_path / "out", BYTES, 16)
    with pytest.raises(DataError, match="holds tokens, not text"):
        list(open_source(tmp_path / "out").documents())
    with pytest.raises(DataError, match="already holds texts in another state or of another tokenizer"):
        tokenise_into(tmp_path / "out", Texts("other"), BPE)
    with pytest.raises(DataError, match="holds tokens already"):
        tokenise_into(tmp_path / "again", open_source(tmp_path / "out"), BPE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(DataError, match="is not empty and holds no token store"):
        tokenise_into(tmp_path / "full", texts, BPE)
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_an_unfinished_store_is_a_clear_source_error(tmp_path: Path) -> None:
    class Failing(Texts):
        def _documents(self):
            yield from self.texts
            raise DataError("cut")

    with pytest.raises(DataError, match="cut"):
        tokenise_into(tmp_path / "out", Failing("abc " * 100), BYTES, shard_tokens=100)
    with pytest.raises(DataError, match="unfinished token store of texts.*same command"):
        open_source(tmp_path / "out")
    with pytest.raises(DataError, match="unfinished store of texts with shards of 100 tokens"):
        tokenise_into(tmp_path / "out", Texts("abc " * 100), BYTES, shard_tokens=200)
    assert (
        tokenise_into(tmp_path / "out", Texts("abc " * 100), BYTES, shard_tokens=100).index.num_tokens == 400
    )


# --- tokenizers -------------------------------------------------------------------------------------------


def test_the_cache_is_kept_per_tokenizer_and_end_of_document(tmp_path: Path) -> None:
    """Tokenizers that differ in one of the two only: their tokens are others."""
    texts = Texts("abc abc bca cab " * 10)
    other = Tokenizer.train_bpe(["cab cab " * 30], 280)
    assert (other.eos_id, other.vocab_size) != (None, BPE.vocab_size) and other.eos_id == BPE.eos_id
    two = Tokenizer.train_bpe(["abc "], 270, special_tokens=("<|endoftext|>", "</s>"))
    two.save(tmp_path / "two")
    config = tmp_path / "two" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "</s>"}))
    renamed = Tokenizer.from_folder(tmp_path / "two")
    assert renamed.sha256 == two.sha256 and renamed.eos_id != two.eos_id
    for tokenizer in (BPE, other, two, renamed):
        store = tokenise(texts, tokenizer, tmp_path / "cache")
        assert store.index.tokenizer == tokenizer.sha256
        assert store.tokens[-1] == tokenizer.eos_id
        assert tokenizer.decode(store.tokens) == texts.texts[0]
    assert texts.reads == 4
