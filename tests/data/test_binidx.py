"""Megatron's and RWKV's token files: every type, end-of-document conventions, damage with file and byte."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from spikelm.data import TokenBlocks, open_source
from spikelm.data.store import tokenise
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(["abc abc bca cab " * 30], 280)
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<u2", 7: "<u4", 8: "<u2"}


def write(
    path: Path,
    sequences: list[list[int]],
    code: int = 8,
    dtype: str | None = None,
    documents: list[int] | None = None,
) -> Path:
    """The format as Megatron-LM describes it, written field by field."""
    kind = np.dtype(dtype or TYPES[code])
    lengths = [len(sequence) for sequence in sequences]
    pointers = np.cumsum([0, *lengths])[:-1] * kind.itemsize
    documents = documents or list(range(len(sequences) + 1))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )
    path.with_suffix(".bin").write_bytes(b"".join(np.array(s, kind).tobytes() for s in sequences))
    return path.with_suffix(".bin")


@pytest.mark.parametrize(("code", "dtype"), [*TYPES.items(), (8, "<u8")])
def test_every_type_of_tokens(code: int, dtype: str, tmp_path: Path) -> None:
    sequences = [list(b"abc"), list(b"de"), [], list(b"fghij")]
    path = write(tmp_path / "some.data", sequences, code, dtype)
    expected = TokenBlocks.from_documents(["abc", "de", "fghij"], BYTES, 3)
    for spec in (path, path.with_suffix(".idx")):
        blocks = TokenBlocks.build(spec, BYTES, 3, tmp_path / "cache")
        assert blocks.starts.tolist() == [0, 3, 5] and (blocks.num_tokens, blocks.num_bytes) == (10, 10)
        ours, theirs = (b.blocks(np.arange(3)) for b in (blocks, expected))
        for name in ("inputs", "targets", "reset", "target_bytes"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
        assert isinstance(blocks.store.tokens, np.memmap) and blocks.store.tokens.dtype == np.dtype(dtype)
        blocks.store.verify()
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.npy")) == 128 + 24  # no token


def test_the_name_without_an_ending(tmp_path: Path) -> None:
    write(tmp_path / "pile.v1.bin", [list(b"abcdef")])
    assert TokenBlocks.build(f"{tmp_path}/pile.v1", BYTES, 2, tmp_path / "cache").num_tokens == 6


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [list(b"ab"), list(b"cd"), list(b"ef")], documents=[0, 2, 2, 3])
    assert TokenBlocks.build(path, BYTES, 2, tmp_path / "cache").starts.tolist() == [0, 4]
    data = path.with_suffix(".idx").read_bytes()
    path.with_suffix(".idx").write_bytes(data + bytes(3))  # Megatron's mode of each sequence
    assert TokenBlocks.build(path, BYTES, 2, tmp_path / "cache").starts.tolist() == [0, 4]


def test_end_of_document_in_the_stream_or_not(tmp_path: Path) -> None:
    a, b, c = (BPE.encode(text) for text in ("abc abc", "cab", "bca bca"))
    eos = BPE.eos_id
    size = len(a) + 1
    for name, sequences, documents, starts, ends in (
        ("every", [[*a, eos], [*b, eos], [*c, eos]], None, [0, size, size + len(b) + 1], eos),
        ("last not", [[*a, eos], [*b, eos], c], None, [0, size, size + len(b) + 1], eos),
        ("none", [a, b], None, [0, len(a)], None),
        ("some", [[*a, eos], b, c], None, [0, size, size + len(b)], None),
        ("one sequence", [[*a, eos, *b, eos, *c]], None, [0, size, size + len(b) + 1], eos),
        ("before", [[eos, *a, eos, *b]], None, [0, 1, size + 1], eos),
        ("two in a row", [[*a, eos, eos, *b]], None, [0, size + 1], eos),
    ):
        path = write(tmp_path / f"{name}.bin", sequences, 4, documents=documents)
        blocks = TokenBlocks.build(path, BPE, 2, tmp_path / "cache")
        assert (name, blocks.starts.tolist(), blocks.eos_id) == (name, starts, ends)
        assert blocks.num_bytes == sum(BPE.token_bytes[t] for sequence in sequences for t in sequence)


def test_the_same_tokens_as_our_own_store(tmp_path: Path) -> None:
    texts = ["abc abc bca", "cab", "abc" * 50]
    path = write(tmp_path / "a.bin", [[*BPE.encode(text), BPE.eos_id] for text in texts])
    ours = TokenBlocks.from_documents(texts, BPE, 8)
    theirs = TokenBlocks.build(path, BPE, 8, tmp_path / "cache")
    assert theirs.store.index.tokens_sha256 == ours.store.index.tokens_sha256
    assert (theirs.num_bytes, theirs.eos_id) == (ours.num_bytes, ours.eos_id)
    assert np.array_equal(theirs.starts, ours.starts)


def test_tokens_are_looked_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [list(b"abc") * 1000])
    done: list[int] = []
    source = open_source(path)
    store = tokenise(source, BYTES, tmp_path / "cache", done.append)
    tokenise(open_source(path), BYTES, tmp_path / "cache", lambda n: pytest.fail("looked again"))
    assert done == [3000]
    (folder,) = (tmp_path / "cache").iterdir()
    for name in ("findings.json", "starts.npy"):  # a damaged record is made again
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"?")
        assert tokenise(source, BYTES, tmp_path / "cache").index == store.index
    # Bytes that change while the time of the change does not.
    stat, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:500] + b"x" + data[501:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        DataError, match=r"a.bin is damaged between byte 0 and byte 6000.*copy the file again"
    ):
        tokenise(source, BYTES, tmp_path / "cache").read(0, 10)


def test_tokens_outside_the_vocabulary_name_position_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [list(b"abc"), [100, 256, 97]])
    with pytest.raises(
        DataError, match=r"a.bin: token 256 at position 4 \(byte 8\) is outside the vocabulary of 256"
    ):
        TokenBlocks.build(path, BYTES, 2, tmp_path / "cache")
    path = write(tmp_path / "b.bin", [[1, 2, -3]], 4)
    with pytest.raises(DataError, match=r"b.bin: token -3 at position 2 \(byte 8\)"):
        TokenBlocks.build(path, BYTES, 2, tmp_path / "cache")


def test_damaged_indices_name_file_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [list(b"abc"), list(b"de")])
    idx = path.with_suffix(".idx")
    whole = idx.read_bytes()  # header 34, lengths 34 to 42, pointers to 58, documents to 82

    def with_bytes(at: int, data: bytes) -> bytes:
        return whole[:at] + data + whole[at + len(data) :]

    for data, message in (
        (b"", r"a.idx is no index of tokens: it does not begin with MMIDIDX \(byte 0\)"),
        (with_bytes(0, b"TNTIDX\x00\x00"), "no index of tokens"),
        (whole[:20], "a.idx is cut off at byte 20, in its header of 34 bytes"),
        (with_bytes(9, b"\x02"), r"a.idx has version 2 \(byte 9\); expected 1"),
        (with_bytes(17, b"\x63"), r"type code 99 \(byte 17\) is unknown"),
        (with_bytes(17, b"\x00"), r"type code 0 \(byte 17\) is unknown"),
        (
            whole[:-1],
            "a.idx is cut off at byte 81: 2 sequences and 3 document entries take 82 bytes and it has 81",
        ),
        (whole + bytes(5), "a.idx is damaged at byte 82"),
        (with_bytes(18, b"\xff" * 8), "a.idx is cut off at byte 82"),
        (with_bytes(38, b"\xff" * 4), "a.idx is damaged at byte 38: a sequence has the length -1"),
        (with_bytes(50, b"\x08"), "a.idx is damaged at byte 50: a sequence lies at byte 8"),
        (with_bytes(66, b"\x07"), "a.idx is damaged at byte 66: a document begins at sequence 7 of 2"),
        (with_bytes(74, b"\x01"), "a.idx is damaged at byte 58: its documents do not cover its 2 sequences"),
        (with_bytes(58, b"\x02"), "a.idx is damaged at byte 66: a document begins at sequence 1 of 2"),
        (with_bytes(34, b"\x04"), "a.idx is damaged at byte 50"),
    ):
        idx.write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            open_source(path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    idx.write_bytes(whole)
    tokens = path.read_bytes()
    path.write_bytes(tokens[:-3])
    with pytest.raises(DataError, match="a.bin is cut off at byte 7: .*a.idx describes 5 tokens of 2 bytes"):
        open_source(path)
    path.write_bytes(tokens + b"x")
    with pytest.raises(DataError, match="a.bin does not fit its index after byte 10"):
        open_source(path)
    path.write_bytes(tokens * 2)
    idx.write_bytes(with_bytes(17, b"\x06"))
    with pytest.raises(
        DataError, match=r"a.idx: type code 6 \(byte 17\) stands for floating-point numbers of 4"
    ):
        open_source(path)
    idx.unlink()
    for spec in (path, idx):
        with pytest.raises(DataError, match="a.idx is missing" if spec == path else "no data source"):
            open_source(spec)
    idx.write_bytes(whole)
    path.unlink()
    with pytest.raises(DataError, match="a.bin is missing"):
        open_source(idx)


def test_files_without_tokens_or_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [[], []])
    with pytest.raises(DataError, match="a.bin holds no tokens"):
        open_source(path)
    path = write(tmp_path / "b.bin", [[1, 2]])
    with pytest.raises(DataError, match="holds tokens, not text"):
        list(open_source(path).documents())
    with pytest.raises(DataError, match="tokens have no fields"):
        open_source(f"{path}#text")


def test_the_record_is_of_one_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [list(b"abcabc")])
    for tokenizer in (BYTES, BPE):
        index = tokenise(open_source(path), tokenizer, tmp_path / "cache").index
        assert index.tokenizer == tokenizer.sha256
        assert index.num_bytes == sum(tokenizer.token_bytes[t] for t in b"abcabc")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "uint16", "uint32"])
def test_files_of_another_writer(dtype: str, tmp_path: Path) -> None:
    """DeepSpeed carries Megatron's writer, with type codes of its own."""
    module = pytest.importorskip("deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = module.MMapIndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.dtype(dtype).type)
    for text in (b"abc", b"de", b"fghij"):
        builder.add_item(torch.tensor(list(text)))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    blocks = TokenBlocks.build(tmp_path / "a.bin", BYTES, 3, tmp_path / "cache")
    assert blocks.starts.tolist() == [0, 3, 5] and blocks.tokens.tolist() == list(b"abcdefghij")
    assert blocks.store.tokens.dtype == np.dtype(dtype)
