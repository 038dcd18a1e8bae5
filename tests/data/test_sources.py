"""Sources: files plain and compressed, folders, JSON lines, the builtin text; what they refuse."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from spikelm.data import open_source
from spikelm.data.files import RECORD_SUFFIXES, TEXT_SUFFIXES
from spikelm.data.python_docs import PythonDocs
from spikelm.errors import DataError

TEXT = "Grüße, 日本.\r\nSecond line \U0001f600\n"


def read(spec: str | Path) -> list[str]:
    return list(open_source(spec).documents())


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix](data)


# --- text files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_text_is_kept_byte_for_byte(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(TEXT.encode(), suffix))
    source = open_source(path)
    assert list(source.documents()) == list(source.documents()) == [TEXT]
    assert source.name == str(path)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_truncated_and_corrupted_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    whole = compress(bytes(range(32, 127)) * 5000, suffix)
    for damaged in (whole[: len(whole) // 2], whole[:-3], b"junk" + whole):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="truncated or corrupted") as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_two_frames_of_zstandard_and_a_missing_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compress(b"one ", ".zst") + compress(b"two" * 200_000, ".zst"))
    assert read(path) == ["one " + "two" * 200_000]
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DataError, match="pip install zstandard"):
        read(path)


def test_invalid_utf8_names_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress("é".encode() * 10 + b"\xff more"))
    with pytest.raises(DataError, match=r"a\.txt\.xz: byte 20 \(0xff\) is not valid UTF-8"):
        read(path)
    (tmp_path / "b.txt").write_text("words", encoding="utf-16")
    with pytest.raises(DataError, match="looks like UTF-16"):
        read(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfabc\xff")
    with pytest.raises(DataError, match="byte 6 "):
        read(tmp_path / "c.txt")


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words", encoding="utf-8-sig")
    assert read(tmp_path / "a.txt") == ["words"]


def test_real_texts(data_dir: Path) -> None:
    (text,) = read(data_dir / "lm/tinyshakespeare/input.txt.xz")
    assert len(text) == 1_115_394 and text.startswith("First Citizen:")


# --- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.txt",
        "a/z.md",
        "a.txt.gz",
        "Z.rst",
        ".hidden.txt",
        ".git/x.txt",
        "image.png",
        "empty.txt",
    ):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            b"" if name == "empty.txt" else compress(name.encode(), ".gz" if ".gz" in name else "")
        )
    return tmp_path / "set"


def test_folders_are_read_in_sorted_order(folder: Path) -> None:
    assert read(folder) == ["Z.rst", "a.txt.gz", "a/z.md", "b.txt"]


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    assert len(read(folder)) == 4


def test_folders_split_by_hash(tmp_path: Path) -> None:
    for i in range(400):
        (tmp_path / f"{i:03}.txt").write_text(f"document {i}")
    train, valid, whole = read(f"{tmp_path}#train"), read(f"{tmp_path}#valid"), read(tmp_path)
    assert sorted(train + valid) == sorted(whole) and not set(train) & set(valid)
    assert 8 <= len(valid) <= 36
    (tmp_path / "more.txt").write_text("another")
    assert set(train + valid) < set(read(f"{tmp_path}#train") + read(f"{tmp_path}#valid"))
    assert set(valid) <= set(read(f"{tmp_path}#valid"))


def test_an_empty_share_is_told(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    with pytest.raises(DataError, match="#valid: the held-out share of 3 documents is empty"):
        read(f"{tmp_path}#valid")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "a.txt").write_text("text 19")  # its hash holds it out
    with pytest.raises(DataError, match="#train: the training share of 1 document is empty"):
        read(f"{tmp_path / 'alone'}#train")


def test_the_manual_lists_the_suffixes() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert " ".join(sorted(TEXT_SUFFIXES)) in manual
    assert all(f"{suffix}" in manual for suffix in RECORD_SUFFIXES)


def test_the_example_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manual = Path(__file__).parents[2] / "docs" / "data.md"
    example = manual.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    assert len(names["blocks"].store.index.shards) > 1  # type: ignore[attr-defined]


def test_fingerprint_follows_the_files(folder: Path) -> None:
    before = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == before
    assert open_source(f"{folder}#train").fingerprint() != before
    (folder / "b.txt").write_text("longer than before")
    assert open_source(folder).fingerprint() != before


# --- JSON lines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_jsonl(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    lines = [{"text": TEXT, "title": "one"}, {"title": "two", "text": ""}, {"text": "b", "title": "three"}]
    path.write_bytes(compress("\n\n".join(json.dumps(line) for line in lines).encode(), suffix))
    assert read(path) == read(f"{path}#text") == [TEXT, "b"]
    assert read(f"{path}#title") == ["one", "two", "three"]
    assert open_source(path).fingerprint() != open_source(f"{path}#title").fingerprint()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 3}', r"line 2 \(byte 14\): field 'text' holds a int"),
        (b'{"text": null}', "holds a NoneType"),
        (b'{"txt": "a"}', "unknown field 'text'; did you mean 'txt'"),
        (b"[1]", "JSON list where an object"),
        (b'{"text": ', r"line 2 \(byte 14\) is not valid JSON"),
        (b'{"text": "\xff"}', r"line 2: byte 24 \(0xff\) is not valid UTF-8"),
        (b'{"text": ' + b"[" * 100_000, "nests JSON too deeply|not valid JSON"),
    ],
)
def test_bad_lines_name_file_and_place(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_lone_surrogate_in_json_is_refused_by_the_tokenizer(tmp_path: Path) -> None:
    from spikelm.tokenizer import Tokenizer

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800"}')
    with pytest.raises(DataError, match="lone surrogate"):
        list(Tokenizer.bytes().encode_arrays(read(path)))


def test_real_jsonl(data_dir: Path) -> None:
    documents = read(f"{data_dir}/eval/lambada_openai.jsonl.xz#context")
    assert len(documents) == 5153 and documents[0].startswith("In my palm")


# --- the builtin ------------------------------------------------------------------------------------------


def test_python_docs() -> None:
    whole, train, valid = (read(f"builtin:python-docs{part}") for part in ("", "#train", "#valid"))
    size = sum(len(text.encode()) for text in whole)
    assert 1_000_000 < size < 20_000_000
    assert sorted(train + valid) == sorted(whole) and not set(train) & set(valid)
    assert 0.01 < len(valid) / len(whole) < 0.1
    starts = {text.split("\n")[0] for text in whole}
    assert {"argparse", "json", "email.message", "assert", "lambda"} <= starts
    assert not any(start.startswith(("test.", "idlelib", "site-packages")) for start in starts)


def test_python_docs_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text('topics = {"b": "second", "a": "first"}')
    (tmp_path / "evil.py").write_text(
        '"""Doc."""\nraise SystemExit("ran")\nclass A(B, k=1):\n    """Class."""\n'
        '    def f(self, x: int = 3) -> str:\n        """  Method.\n\n            Indented.\n        """\n'
        "def undocumented(): pass\n"
    )
    (tmp_path / "broken.py").write_text("print 'old python'")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text('"""Left out."""')
    assert list(PythonDocs(tmp_path).documents()) == [
        "a\n\nfirst\n",
        "b\n\nsecond\n",
        "evil\n\nDoc.\n\n\nclass evil.A(B)\n\nClass.\n\n\n"
        "def evil.A.f(self, x: int=3) -> str\n\nMethod.\n\nIndented.\n",
    ]


def test_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="carries no library sources"):
        list(PythonDocs(tmp_path).documents())


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty"),
        ("absent.txt", "there is no data source absent.txt"),
        ("absent.jsonl#text", "there is no data source absent.jsonl"),
        ("builtin:python", "unknown builtin source 'python'; did you mean 'python-docs'"),
        ("builtin:python-docs#vaild", "did you mean 'valid'"),
        ("{dir}/a.txt#text", "which only .jsonl"),
        ("{dir}/none", "holds no text files"),
        ("{dir}#test", "unknown part 'test'"),
    ],
)
def test_bad_specifications(spec: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=message):
        open_source(spec.format(dir=tmp_path))


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n')
    for spec in (tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path):
        with pytest.raises(DataError, match="holds no text"):
            read(spec)


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("words")
    source = open_source(path)
    path.unlink()
    with pytest.raises(DataError, match="there is no file"):
        list(source.documents())
    with pytest.raises(DataError, match="cannot be read"):
        source.fingerprint()
