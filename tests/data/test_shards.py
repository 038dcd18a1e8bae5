"""Token stores in shards: read as one, written on after an interruption, refused when damaged."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data import TokenBlocks, open_source
from spikelm.data.store import open_store, tokenise, tokenise_into
from spikelm.data.writing import Plan
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer

from .stores import BPE, BYTES, Texts

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
