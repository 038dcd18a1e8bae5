"""Data sets through the ``datasets`` library: folders in its layout, saved ones, what cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spikelm.data import TokenBlocks, open_source
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

datasets = pytest.importorskip("datasets")


def read(spec: str) -> list[str]:
    return list(open_source(spec).documents())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies go to a folder of the test, and nothing is asked of the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three splits, as a data set's repository holds them."""
    root = tmp_path / "set" / "data"
    root.mkdir(parents=True)
    for split, rows in (("train", ["a", None, "", "b", "日本"]), ("validation", ["c"]), ("test", ["d"])):
        data = pa.table(
            {"text": rows, "title": [f"{split} {i}" for i in range(len(rows))], "n": range(len(rows))}
        )
        pq.write_table(data, root / f"{split}-00000-of-00001.parquet")
    return root.parent


@pytest.mark.parametrize("stream", ["", "?stream"])
def test_splits_and_fields(stream: str, folder: Path, tmp_path: Path) -> None:
    spec = f"hub:{folder}{stream}"
    assert read(spec) == read(f"{spec}#train") == read(f"{spec}#train.text") == ["a", "b", "日本"]
    assert read(f"{spec}#validation.title") == ["validation 0"] and read(f"{spec}#test") == ["d"]
    if not stream:
        assert read(f"{spec}#train[:1]") == ["a"] and read(f"{spec}#train[1:].title#train")
    for wrong, message in (
        ("#valid", "unknown split 'valid'; did you mean 'validation'? known: test, train, validation"),
        ("#train.txt", "unknown field 'txt'; did you mean 'text'?"),
        ("#train.n", "field 'n' holds"),
    ):
        with pytest.raises(DataError) as caught:
            read(spec + wrong)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="unknown configuration 'defaults'; did you mean 'default'"):
        read(f"hub:{folder}:defaults{stream}")
    blocks = TokenBlocks.build(f"{spec}#train.title", Tokenizer.bytes(), 4, tmp_path / "tokens")
    assert blocks.num_documents == 5


def test_a_slice_of_a_stream_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="names a slice, which a stream has not"):
        read(f"hub:{folder}?stream#train[:1]")


def test_fingerprint_follows_the_data(folder: Path) -> None:
    spec = f"hub:{folder}"
    before = open_source(spec).fingerprint()
    assert open_source(spec).fingerprint() == open_source(f"{spec}#train.text").fingerprint() == before
    assert len({open_source(spec + rest).fingerprint() for rest in ("", "#test", "#train.title")}) == 3
    new = pa.table({"text": ["new", "data"], "title": ["x", "y"], "n": [0, 1]})
    pq.write_table(new, folder / "data" / "train-00000-of-00001.parquet")
    os.utime(folder / "data" / "train-00000-of-00001.parquet", ns=(10**18, 10**18))
    assert open_source(spec).fingerprint() != before
    assert read(spec) == ["new", "data"]


@pytest.mark.parametrize("stream", ["", "?stream"])
def test_what_cannot_be_reached_is_one_sentence(stream: str, folder: Path) -> None:
    with pytest.raises(
        DataError, match="nothing.*the Hub cannot be reached.*connect to the network"
    ) as caught:
        read(f"hub:nobody/nothing{stream}")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be reached"):
        open_source("hub:nobody/nothing:config@main#train").fingerprint()
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no parquet at all")
    with pytest.raises(DataError, match="cannot be read: ") as caught:
        read(f"hub:{folder}{stream}")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_code_of_a_data_set_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="cannot be read"):
        read(f"hub:{tmp_path / 'script'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("spec", ["", "#train", "a/b?streamed", "a/b#", "a/b:#x", "a/b#train[", "a/b#.text"])
def test_specifications_that_are_none(spec: str) -> None:
    with pytest.raises(DataError, match=r"expected hub:OWNER/NAME\[:CONFIG\]"):
        open_source(f"hub:{spec}")


def test_saved_data_sets(folder: Path, tmp_path: Path) -> None:
    data = datasets.load_dataset(str(folder), split="train")
    data.save_to_disk(tmp_path / "one")
    assert read(f"{tmp_path}/one") == read(f"{tmp_path}/one#text") == ["a", "b", "日本"]
    assert read(f"{tmp_path}/one#title")[0] == "train 0"
    with pytest.raises(DataError, match="did you mean 'title'"):
        read(f"{tmp_path}/one#titel")
    # A selection is saved with the rows it leaves out: the library knows which count.
    data.select([4, 0]).save_to_disk(tmp_path / "some")
    assert read(f"{tmp_path}/some") == ["日本", "a"]
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "both")
    assert read(f"{tmp_path}/both") == ["a", "b", "日本"] and read(f"{tmp_path}/both#test") == ["b"]
    assert read(f"{tmp_path}/both#test.title") == ["train 3"]
    with pytest.raises(DataError, match="unknown split 'tests'; did you mean 'test'"):
        open_source(f"{tmp_path}/both#tests")
    before = open_source(f"{tmp_path}/one").fingerprint()
    (file,) = (tmp_path / "one").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    assert open_source(f"{tmp_path}/one").fingerprint() != before
    with pytest.raises(DataError, match="one cannot be read"):
        read(f"{tmp_path}/one")
