"""Parquet and Arrow files, globs and folders of record files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spikelm.data import open_source
from spikelm.errors import DataError

ROWS = ["Grüße, 日本.\r\n", None, "", "b", *(f"row {i}" for i in range(3000))]
TEXTS = [row for row in ROWS if row]


def read(spec: str | Path) -> list[str]:
    return list(open_source(spec).documents())


def table(kind: Any = None) -> pa.Table:
    return pa.table({"n": pa.array(range(len(ROWS))), "text": pa.array(ROWS, kind or pa.string())})


def write(path: Path, data: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(data, path, row_group_size=500, write_page_checksum=True, compression="none")
    elif path.name.startswith("stream"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
            writer.write_table(data, max_chunksize=500)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema) as writer:
            writer.write_table(data, max_chunksize=500)
    return path


NAMES = ["a.parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_columns_of_text(name: str, kind: Any, tmp_path: Path) -> None:
    if name == "a.parquet" and kind == pa.string_view():
        pytest.skip("parquet has no such type")
    path = write(tmp_path / name, table(kind))
    assert read(path) == read(f"{path}#text") == TEXTS
    train, valid = read(f"{path}#text#train"), read(f"{path}#text#valid")
    assert sorted(train + valid) == sorted(TEXTS) and 0.02 < len(valid) / len(TEXTS) < 0.08
    with pytest.raises(DataError, match="unknown field 'txt'; did you mean 'text'"):
        read(f"{path}#txt")
    with pytest.raises(DataError, match="field 'n' holds int64 where text was expected"):
        read(f"{path}#n")
    (path.parent / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(f"{path}.gz") == TEXTS


@pytest.mark.parametrize("name", NAMES)
def test_fingerprint_follows_file_and_field(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, table())
    before = open_source(path).fingerprint()
    assert before == open_source(f"{path}#text").fingerprint() != open_source(f"{path}#n").fingerprint()
    write(path, table().slice(1))
    assert open_source(path).fingerprint() != before


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_cut_off_or_damaged_are_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, table())
    whole = path.read_bytes()
    for data in (b"", whole[:3], whole[: len(whole) // 2], whole[:-3]):
        if name == "stream.arrow" and data == whole[:-3]:
            continue  # only a part of the mark at the end is missing, no row
        path.write_bytes(data)
        with pytest.raises(DataError, match="truncated or corrupted") as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    at = whole.index(b"row 1234")
    path.write_bytes(whole[: at + 4] + b"\xff" + whole[at + 5 :])
    with pytest.raises(DataError, match=r"(truncated or corrupted after row \d+|rows \d+ to \d+: field)"):
        read(path)


def test_globs_take_files_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for i in (2, 1):
        pq.write_table(pa.table({"text": [f"parquet {i}"]}), tmp_path / f"{i}.parquet")
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": f"json {i}", "body": f"body {i}"}))
        (tmp_path / "deep" / f"{i}.txt").write_text(f"text {i}")
    assert read(f"{tmp_path}/*.parquet") == read(f"{tmp_path}/?.parquet#text") == ["parquet 1", "parquet 2"]
    assert read(f"{tmp_path}/[0-9].jsonl#body") == ["body 1", "body 2"]
    assert read(f"{tmp_path}/**/*.txt") == ["text 1", "text 2"]
    assert read(f"{tmp_path}/[12].*#text") == ["json 1", "parquet 1", "json 2", "parquet 2"]
    assert open_source(f"{tmp_path}/*.jsonl#body").name == f"{tmp_path}/*.jsonl#body"
    before = open_source(f"{tmp_path}/*.jsonl").fingerprint()
    (tmp_path / "3.jsonl").write_text('{"text": "more"}')
    assert open_source(f"{tmp_path}/*.jsonl").fingerprint() != before
    for spec, message in (
        ("*.csv", "no file matches"),
        ("**/*", "matches both"),
        ("**/*.txt#text", "unknown part 'text'"),
        ("*.jsonl#text#x", "unknown part 'x'"),
        ("*.jsonl#text#train#y", "'#y' is one too many"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(f"{tmp_path}/{spec}")


def test_a_name_with_the_signs_of_a_glob_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a[1]#2.txt").write_text("words")
    assert read(f"{tmp_path}/a[1]#2.txt") == ["words"]


def test_folders_of_records(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# About the data")
    pq.write_table(pa.table({"text": ["b"], "body": ["B"]}), tmp_path / "data" / "train-00001.parquet")
    pq.write_table(pa.table({"text": ["a"], "body": ["A"]}), tmp_path / "data" / "train-00000.parquet")
    assert read(tmp_path) == ["a", "b"] and read(f"{tmp_path}#body") == ["A", "B"]
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "data" / "test-00000.parquet")
    with pytest.raises(DataError, match="holds the splits test, train; name one with hub:.*#train"):
        open_source(tmp_path)
    (tmp_path / "story.txt").write_text("a story")  # plain text: a folder of text, as ever
    assert read(tmp_path) == ["# About the data", "a story"]
