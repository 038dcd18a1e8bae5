"""Tokenizers: bytes, files, training, decoding piece by piece, bad input."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data.compressed import read_bytes
from spikelm.data.plain_text import split_lines
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

SAMPLE = "Hello, wörld! 日本語 \U0001f600 naïve  spaces\n\nnew line\ttab it's 1234 <|endoftext|> end"


def data(path: str) -> Path:
    root = os.environ.get("SPIKELM_DATA", "")
    if not root or not (Path(root) / path).exists():
        pytest.skip(f"SPIKELM_DATA holds no {path}")
    return Path(root) / path


def novels(chars: int) -> str:
    with lzma.open(data("lm/novels/valid.txt.xz")) as stream:
        return stream.read(chars).decode("utf-8", errors="ignore")


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    text = "the cat sat on the mat, the dog sat on the log. " * 20 + "été 日本 " * 10
    return Tokenizer.train_bpe([text, text.upper()], 300)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.load(data("tokenizers/gpt2"))


@pytest.fixture(scope="module")
def neox() -> Tokenizer:
    return Tokenizer.load(data("tokenizers/gpt-neox-20b"))


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.load(data("tokenizers/qwen2"))


def sentencepiece() -> Tokenizer:
    """A tokenizer in Llama's scheme: Metaspace and bytes for what the vocabulary lacks."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{i:02X}>" for i in range(256)],
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "ab",
    ]
    decoder = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizer = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    special = [
        {"id": i, "content": c, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, c in enumerate(names[:3])
    ]
    model = {"type": "BPE", "vocab": {n: i for i, n in enumerate(names)}, "byte_fallback": True}
    model |= {"merges": [["\u2581", "a"], ["a", "b"]], "unk_token": "<unk>", "fuse_unk": True}
    spec = {"version": "1.0", "added_tokens": special, "post_processor": None, "pre_tokenizer": None}
    spec |= {"normalizer": {"type": "Sequence", "normalizers": normalizer}}
    return Tokenizer(spec | {"decoder": {"type": "Sequence", "decoders": decoder}, "model": model})


# --- bytes ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text())
def test_bytes_ids_are_byte_values(text: str) -> None:
    tokenizer = BYTES
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


BYTES = Tokenizer.bytes()


def test_bytes_is_a_tokenizer_json_that_the_library_reads(tmp_path: Path) -> None:
    import tokenizers

    BYTES.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(SAMPLE).ids == list(SAMPLE.encode("utf-8"))
    assert other.decode(other.encode(SAMPLE).ids) == SAMPLE
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == BYTES.sha256 and again.is_bytes
    assert (BYTES.vocab_size, BYTES.eos_id, BYTES.bos_id) == (256, None, None)
    assert BYTES.token_bytes.tolist() == [1] * 256


def test_bytes_needs_no_tokenizers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    tokenizer = Tokenizer.bytes()
    assert tokenizer.decode(tokenizer.encode_array(SAMPLE)) == SAMPLE
    with pytest.raises(DataError, match="pip install tokenizers"):
        Tokenizer.train_bpe(["text"], 300)


# --- files of others --------------------------------------------------------------------------------------


def test_gpt2_neox_qwen_known_ids(gpt2: Tokenizer, neox: Tokenizer, qwen: Tokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello<|endoftext|>") == [15496, 50256]
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert neox.encode("Hello world") == [12092, 1533]
    assert (neox.vocab_size, neox.eos_id) == (50277, 0)
    assert qwen.encode("Hello world") == [9707, 1879]
    assert (qwen.vocab_size, qwen.eos_id, qwen.bos_id) == (151665, 151643, 151644)
    assert qwen.chat_template is not None and "im_start" in qwen.chat_template
    assert qwen.dtype == np.uint32 and neox.dtype == np.uint16


def test_qwen_agrees_with_transformers(qwen: Tokenizer, tmp_path: Path) -> None:
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    folder = data("tokenizers/qwen2")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(lzma.decompress((folder / f"{name}.xz").read_bytes()))
    merges = [tuple(m.split(" ")) for m in (tmp_path / "merges.txt").read_text("utf-8").split("\n")[1:] if m]
    other = Qwen2Tokenizer(json.loads((tmp_path / "vocab.json").read_text("utf-8")), merges)
    text = SAMPLE.replace("<|endoftext|>", "") + novels(20000)
    assert qwen.encode(text) == other.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["small", "gpt2", "neox", "qwen"])
def test_token_bytes_count_the_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = SAMPLE + " " * 30 + "x" * 100
    ids = tokenizer.encode_array(text)
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id is not None and tokenizer.token_bytes[tokenizer.eos_id] == 0


@pytest.mark.parametrize("name", ["small", "gpt2", "neox", "qwen"])
def test_saved_tokenizer_is_the_same(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == tokenizer.sha256
    assert (again.eos_id, again.bos_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert again.chat_template == tokenizer.chat_template
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert other.encode(SAMPLE, add_special_tokens=False) == tokenizer.encode(SAMPLE)
    assert other.eos_token_id == tokenizer.eos_id


def test_hash_ignores_layout_and_truncation(neox: Tokenizer, tmp_path: Path) -> None:
    spec = json.loads(read_bytes(data("tokenizers/gpt-neox-20b/tokenizer.json.xz")))
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(spec.items())), indent=1))
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == neox.sha256
    assert len(again.encode("one two three four five six")) == 6


def test_special_tokens_in_documents_are_text(neox: Tokenizer) -> None:
    ids = neox.encode_array("a<|endoftext|>b")
    assert neox.eos_id not in ids and neox.decode(ids) == "a<|endoftext|>b"
    assert neox.eos_id in neox.encode("a<|endoftext|>b")
    assert neox.decode(neox.encode("a<|endoftext|>b")) == "ab"
    assert neox.decode(neox.encode("a<|endoftext|>b"), skip_special=False) == "a<|endoftext|>b"


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen"])
def test_cutting_long_text_changes_nothing(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = novels(450_000)
    assert len(list(split_lines(text))) > 3 and tokenizer.splits_at_lines
    arrays = list(tokenizer.encode_arrays(["", text, "short", "", "x" * 200_000]))
    assert arrays[1].tolist() == tokenizer.encode(text, parse_special=False)
    assert [len(arrays[0]), len(arrays[3])] == [0, 0]
    assert arrays[2].tolist() == tokenizer.encode("short")
    assert arrays[4].tolist() == tokenizer.encode("x" * 200_000)


@settings(deadline=None)
@given(st.text(alphabet="ab \n\r\u3000.1é", max_size=200), st.integers(1, 20))
def test_cutting_loses_nothing_and_is_exact(text: str, chunk: int) -> None:
    parts = list(split_lines(text, chunk))
    assert "".join(parts) == text
    tokenizer = trained_once()
    together = [i for part in parts for i in tokenizer.encode(part, parse_special=False)]
    assert together == tokenizer.encode(text, parse_special=False)


_TRAINED: list[Tokenizer] = []


def trained_once() -> Tokenizer:
    if not _TRAINED:
        _TRAINED.append(Tokenizer.train_bpe(["ab \n\n\n \n a\n\nb. ab\n ab 1\r\n\r\n" * 30], 320))
    return _TRAINED[0]


# --- training ---------------------------------------------------------------------------------------------


def test_trained_bpe(small: Tokenizer) -> None:
    assert 257 < small.vocab_size <= 300
    assert small.eos_id == 0
    assert len(small.encode("the cat sat")) < 6
    assert small.decode(small.encode(SAMPLE, parse_special=False)) == SAMPLE


def test_training_is_deterministic() -> None:
    texts = ["ab ba abab baba cd dc " * 30, "one two three " * 20]
    assert Tokenizer.train_bpe(texts, 290).sha256 == Tokenizer.train_bpe(iter(texts), 290).sha256


def test_training_without_special_tokens() -> None:
    tokenizer = Tokenizer.train_bpe(["aaaa bbbb " * 10], 256, special_tokens=())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (256, None)


@pytest.mark.parametrize("size", [True, 256, -1, 3.5])
def test_training_refuses_small_vocabulary(size: int) -> None:
    with pytest.raises(DataError, match="at least 257"):
        Tokenizer.train_bpe(["text"], size)


def test_training_refuses_repeated_special_tokens() -> None:
    with pytest.raises(DataError, match="different"):
        Tokenizer.train_bpe(["text"], 300, special_tokens=("<a>", "<a>"))


# --- decoding piece by piece ------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60))
def test_byte_stream_joins_to_decode(ids: list[int]) -> None:
    stream = BYTES.decode_stream()
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == BYTES.decode(ids) == bytes(ids).decode("utf-8", errors="replace")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_streams_never_split_a_character(text: str) -> None:
    stream = BYTES.decode_stream()
    pieces = [stream.push(i) for i in BYTES.encode(text)]
    assert "".join(pieces) == text and stream.finish() == ""
    assert all(len(piece) <= 1 for piece in pieces)


def test_streams_of_merged_tokens(gpt2: Tokenizer) -> None:
    for cut in range(len(gpt2.encode(SAMPLE)) + 1):
        ids = gpt2.encode(SAMPLE)[:cut]
        stream = gpt2.decode_stream()
        text = "".join(stream.push(i) for i in ids)
        assert "\ufffd" not in text
        assert text + stream.finish() == gpt2.decode(ids)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab é日\U0001f600", max_size=20))
def test_streams_of_sentencepiece(text: str) -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode(text)
    stream = tokenizer.decode_stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece_is_read() -> None:
    tokenizer = sentencepiece()
    assert (tokenizer.eos_id, tokenizer.bos_id) == (2, 1)
    assert not tokenizer.is_byte_level and not tokenizer.splits_at_lines
    assert tokenizer.token_bytes[tokenizer.encode("a\u00e9")].sum() == 4  # the space put before counts


def test_stream_hides_special_tokens(small: Tokenizer) -> None:
    assert small.eos_id is not None
    assert small.decode_stream().push(small.eos_id) == ""
    assert small.decode_stream(skip_special=False).push(small.eos_id) == "<|endoftext|>"


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 256, 10**9])
def test_unknown_ids_are_refused(token: int) -> None:
    with pytest.raises(DataError, match=f"token id {token} is outside the vocabulary of 256 ids"):
        BYTES.decode([65, token])
    with pytest.raises(DataError):
        BYTES.decode_stream().push(token)


def test_lone_surrogates_are_refused(small: Tokenizer) -> None:
    for tokenizer in (BYTES, small):
        with pytest.raises(DataError, match=r"character 2 .* lone surrogate \(U\+D800\)"):
            tokenizer.encode("ab\ud800")
        with pytest.raises(DataError, match="lone surrogate"):
            list(tokenizer.encode_arrays(["ab\ud800"]))
        assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "JSON list where an object"),
        ("{}", "key 'model'"),
        ('{"model": {"vocab": 3}}', "model.vocab"),
        ('{"model": {"vocab": {"a": -1}}}', "model.vocab"),
        ('{"model": {"type": "Foo", "vocab": {"a": 0}}}', "no usable tokenizer"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', "added token"),
        ("\udcff", "byte 0 .0xff. is not valid UTF-8"),
    ],
)
def test_damaged_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="there is no tokenizer"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(DataError, match="there is no file"):
        Tokenizer.from_file(tmp_path / "absent.json")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(DataError, match="merges.txt line 2: expected two tokens"):
        Tokenizer.load(tmp_path)
