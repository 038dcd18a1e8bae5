"""Token stores and blocks: targets and resets at document ends, order, bytes, cache, damage."""

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
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data import TokenBlocks, open_source
from spikelm.data.source import Source
from spikelm.data.store import Index, default_cache_dir, open_store, tokenise
from spikelm.errors import DataError
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


def blocks_of(texts: list[str], tokenizer: Tokenizer, length: int) -> TokenBlocks:
    return TokenBlocks.from_documents(texts, tokenizer, length)


def in_order(blocks: TokenBlocks):
    return blocks.blocks(np.arange(len(blocks)))


# --- what a batch holds -----------------------------------------------------------------------------------


def test_bytes_without_end_of_document() -> None:
    batch = in_order(blocks_of(["abc", "de", "fghij"], BYTES, 3))
    assert batch.inputs.tolist() == [list(b"abc"), list(b"def"), list(b"ghi")]
    assert batch.targets.tolist() == [[98, 99, -100], [101, -100, 103], list(b"hij")]
    assert batch.reset.tolist() == [[True, False, False], [True, False, True], [False] * 3]
    assert batch.target_bytes.tolist() == [2, 2, 3]
    assert batch.inputs.dtype == batch.targets.dtype == batch.samples.dtype == torch.int64
    assert batch.reset.dtype == torch.bool and batch.target_bytes.dtype == torch.int64


def test_end_of_document_is_predicted_and_predicts() -> None:
    eos = BPE.eos_id
    batch = in_order(blocks_of(["x", "yz", "w"], BPE, 2))
    x, y, z, w = (BPE.encode(c)[0] for c in "xyzw")
    assert batch.inputs.tolist() == [[x, eos], [y, z], [eos, w]]
    assert batch.targets.tolist() == [[eos, y], [z, eos], [w, eos]]
    assert batch.reset.tolist() == [[True, False], [True, False], [False, True]]
    assert batch.target_bytes.tolist() == [1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="abc é日", max_size=30), min_size=1, max_size=8), st.integers(1, 9))
def test_batches_agree_with_a_plain_loop(texts: list[str], length: int) -> None:
    for tokenizer in (BYTES, BPE):
        stream: list[tuple[int, bool]] = []
        for text in filter(None, texts):
            ids = tokenizer.encode(text) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
            stream += [(token, i == 0) for i, token in enumerate(ids)]
        if len(stream) <= length:
            with pytest.raises(DataError, match="fewer than one block"):
                blocks_of(texts, tokenizer, length)
            continue
        blocks = blocks_of(texts, tokenizer, length)
        assert len(blocks) == (len(stream) - 1) // length
        assert blocks.num_bytes == sum(len(text.encode()) for text in texts)
        batch = in_order(blocks)
        for row in range(len(blocks)):
            window = stream[row * length : row * length + length + 1]
            assert batch.inputs[row].tolist() == [token for token, _ in window[:-1]]
            assert batch.reset[row].tolist() == [starts for _, starts in window[:-1]]
            lone = tokenizer.eos_id is None
            targets = [-100 if starts and lone else token for token, starts in window[1:]]
            assert batch.targets[row].tolist() == targets
            counted = [tokenizer.token_bytes[token] for token in targets if token != -100]
            assert batch.target_bytes[row] == sum(counted)


def test_documents_are_given_back() -> None:
    blocks = blocks_of(["abc", "", "de"], BPE, 1)
    assert [BPE.decode(blocks.document(i)) for i in range(blocks.num_documents)] == ["abc", "de"]
    assert blocks.bytes_per_token == 5 / blocks.num_tokens
    with pytest.raises(DataError, match="document 2 does not exist"):
        blocks.document(2)


# --- order ------------------------------------------------------------------------------------------------


def test_order_does_not_depend_on_the_batch_size() -> None:
    blocks = blocks_of(["".join(chr(33 + i % 90) for i in range(1000))], BYTES, 7)
    whole = blocks.batch(5, 0, 300)
    assert whole.samples.tolist() == list(range(300))
    for size in (1, 4, 7, 100):
        parts = [blocks.batch(5, first, min(size, 300 - first)) for first in range(0, 300, size)]
        for name in ("inputs", "targets", "reset", "samples", "target_bytes"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    ranks = [blocks.gather(5, np.arange(rank, 300, 3)) for rank in range(3)]
    assert torch.equal(torch.stack([r.inputs for r in ranks], 1).flatten(0, 1), whole.inputs)


def test_every_epoch_sees_every_block_in_another_order() -> None:
    blocks = blocks_of([bytes(range(128)).decode()], BYTES, 2)
    n = len(blocks)
    epochs = [blocks.batch(0, epoch * n, n).inputs[:, 0].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 2 * n, 2)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert blocks.batch(1, 0, n).inputs[:, 0].tolist() != epochs[0]


def test_bad_requests_are_refused() -> None:
    blocks = blocks_of(["abcdef"], BYTES, 2)
    for first, size in ((-1, 1), (0, 0)):
        with pytest.raises(DataError, match="at least 1 sample"):
            blocks.batch(0, first, size)
    for length in (0, -1, True, 2.0):
        with pytest.raises(DataError, match="block_length"):
            blocks_of(["abcdef"], BYTES, length)


# --- the store --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_store_holds_the_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["abc é日", "", "<|endoftext|> as text"] * 50
    store = tokenise(Texts(*texts), tokenizer, tmp_path)
    memory = blocks_of(texts, tokenizer, 4)
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16
    assert np.array_equal(store.tokens, memory.tokens) and np.array_equal(store.starts, memory.starts)
    assert store.index.byte_exact and store.index.num_bytes == sum(len(text.encode()) for text in texts)
    assert np.array_equal(np.load(store.path / "tokens.npy"), store.tokens)
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


def test_two_writers_at_once(tmp_path: Path) -> None:
    inner = Texts("abc" * 10)

    class Racing(Texts):
        def _documents(self):
            tokenise(inner, BYTES, tmp_path)  # finishes first
            yield from super()._documents()

    store = tokenise(Racing(*inner.texts), BYTES, tmp_path)
    assert store.tokens.tobytes() and len(list(tmp_path.iterdir())) == 1
    store.verify()


def damaged_store(tmp_path: Path) -> Path:
    path = tokenise(Texts("abc def " * 100, "ghi"), BYTES, tmp_path).path
    assert path is not None
    return path


def test_damaged_stores_name_the_file(tmp_path: Path) -> None:
    path = damaged_store(tmp_path)
    tokens, index, starts = path / "tokens.npy", path / "index.json", path / "starts.npy"
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
        ("{}", "has format None; expected 2"),
        ("[]", "does not describe"),
        ("\x00" * len(described), "cannot be read"),
        (json.dumps(json.loads(described) | {"format_version": 9}), "has format 9"),
        (json.dumps(json.loads(described) | {"more": 1}), "does not describe"),
        (json.dumps(json.loads(described) | {"num_bytes": 7}), "is damaged"),
        (json.dumps(json.loads(described) | {"tokens_crc32": None}), "is damaged"),
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
    os.truncate(path / "tokens.npy", 200)
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
    (path / "starts.npy").write_bytes((path / "starts.npy").read_bytes()[:128])
    reseal(path / "index.json", num_documents=0)
    with pytest.warns(UserWarning, match="0 documents.*tokenising texts again"):
        assert tokenise(source, BYTES, tmp_path).index.num_documents == 1


@pytest.mark.parametrize("name", ["tokens.npy", "starts.npy", "index.json"])
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
    data = bytearray((path / "tokens.npy").read_bytes())
    data[600:800] = bytes(200)
    (path / "tokens.npy").write_bytes(data)
    with pytest.raises(DataError, match=r"tokens.npy is damaged between byte 0 and byte 1734"):
        open_store(path)


def test_large_stores_are_checked_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spikelm.data.store.CHECKED_AT_OPEN", 1000)
    monkeypatch.setattr("spikelm.data.checksums.CHUNK", 256)
    store = tokenise(Texts("abcdefgh" * 100), BYTES, tmp_path)
    data = bytearray((store.path / "tokens.npy").read_bytes())
    data[1000] ^= 1  # token 436, in the chunk of bytes 768 to 1024
    (store.path / "tokens.npy").write_bytes(data)
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
        in_order(blocks)
    assert sum(sizes) == 136 + 128 + 2 * 800


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    store = open_store(damaged_store(tmp_path))
    tokens = np.array(store.tokens)
    tokens[300] = 65000
    other = replace(store, tokens=tokens, file=None)
    with pytest.raises(DataError, match=r"tokens.npy: token 65000 at position 300 is outside"):
        other.verify()
    with pytest.raises(DataError, match="at position 300 is outside the vocabulary of 256"):
        in_order(TokenBlocks(other, BYTES, 7))


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


def test_runs_on_documents_in_memory_are_told_apart() -> None:
    one, two = (blocks_of([text], BYTES, 2).store.index.tokens_sha256 for text in ("abcd", "abce"))
    assert len(one) == 64 and one != two


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was written with tokenizer"):
        TokenBlocks(open_store(damaged_store(tmp_path)), BPE, 4)


def test_builtin_text_end_to_end(tmp_path: Path) -> None:
    blocks = TokenBlocks.build("builtin:python-docs#valid", BYTES, 128, tmp_path)
    batch = blocks.batch(0, 0, 8)
    assert batch.inputs.shape == (8, 128) and int(batch.inputs.max()) < 256
    texts = list(open_source("builtin:python-docs#valid").documents())
    assert blocks.num_bytes == blocks.num_tokens == sum(len(text.encode()) for text in texts)
    assert torch.equal(batch.to("cpu").inputs, batch.inputs)
