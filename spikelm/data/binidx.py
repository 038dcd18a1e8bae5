r"""Token files of Megatron and RWKV: ``name.bin`` with ``name.idx``, opened where they are.

``name.idx``: ``MMIDIDX\0\0``, version 1 (uint64), a code for the type of the tokens (uint8), numbers of
sequences and of document entries (uint64 each), then the length of every sequence (int32), its place in
``name.bin`` in bytes (int64), and for every document its first sequence, closed by the number of sequences
(int64). Megatron may add a mode per sequence (int8), which is read over. ``name.bin`` holds the tokens alone.

Documents are those of the index, and where an end-of-document token stands inside one, another begins after
it (some tools write all text as one sequence). Whether that token ends every document differs from file to
file; it is looked up, because only then may a document's first token be predicted from it. Looking at all
tokens once gives this, their range, the bytes of text and checksums; the result is kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spikelm.data.checksums import CHUNK, CheckedFile, checksums
from spikelm.data.durable import replace_json, write_bytes
from spikelm.data.files import stamp
from spikelm.data.lock import locked
from spikelm.data.shards import (
    FORMAT_VERSION,
    HEADER_BYTES,
    ShardedTokens,
    check_tokens,
    checksum_of,
    npy_header,
    read_checked_json,
)
from spikelm.data.source import TokenSource
from spikelm.data.store import Index, TokenStore
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, tuple[str, ...]] = {
    1: ("uint8",),
    2: ("int8",),
    3: ("int16",),
    4: ("int32",),
    5: ("int64",),
    6: ("uint16",),
    7: ("uint32",),
    8: ("uint16", "uint64"),
}
"""Types of the tokens by code. Up to 5 all writers agree; then Megatron has two of floating point, which no
token is, and uint16 for 8, where DeepSpeed has uint16, uint32, uint64. The size of the tokens tells which."""
_HEADER = 34
_DAMAGED = "copy the file again"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What looking at all tokens gave.

    Attributes:
        format_version: of this record.
        index: as that of a store.
        tokens_crc32, starts_crc32: checksums of the chunks of ``name.bin`` and of the document starts.
        crc32: checksum of all the above.
    """

    format_version: int
    index: Index
    tokens_crc32: tuple[int, ...]
    starts_crc32: tuple[int, ...]
    crc32: int = 0

    def checksum(self) -> int:
        """What :attr:`crc32` must be."""
        return checksum_of(asdict(replace(self, crc32=0)))


class Binidx(TokenSource):
    """Tokens in ``name.bin``, described by ``name.idx``.

    Attributes:
        dtype: of the tokens.
        starts: int64, positions in tokens where the documents of the index begin, without empty ones.
        num_tokens: how many tokens there are.

    Args:
        bin_path, idx_path: both files.

    Raises:
        DataError: a file is missing, short or damaged, naming it and the byte.
    """

    kind = "Megatron or RWKV token file"

    def __init__(self, bin_path: Path, idx_path: Path) -> None:
        super().__init__(str(bin_path))
        for path, other in ((bin_path, idx_path), (idx_path, bin_path)):
            if not path.is_file():
                raise DataError(f"{path} is missing: {other} cannot be used without it")
        self._bin, self._idx = bin_path, idx_path
        self.dtype, self.starts, self.num_tokens = _read_idx(idx_path, bin_path)

    def open_tokens(
        self, tokenizer: Tokenizer, cache_dir: Path, on_progress: Callable[[int], None] | None
    ) -> TokenStore:
        """See :class:`TokenSource`."""
        identity = json.dumps([FORMAT_VERSION, self.fingerprint(), tokenizer.sha256, tokenizer.eos_id])
        folder = cache_dir / hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()[:32]
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            if not (folder / "findings.json").exists():
                with locked(folder, f"looking through {self.name}"):
                    if not (folder / "findings.json").exists():
                        self._look(folder, tokenizer, on_progress)
            try:
                return self._open(folder)
            except DataError as error:
                if str(folder) not in str(error):
                    raise
            shutil.rmtree(folder, ignore_errors=True)  # the record is damaged, not the tokens
            with locked(folder, f"looking through {self.name}"):
                self._look(folder, tokenizer, on_progress)
        except OSError as error:
            raise DataError(f"cannot write the token cache {cache_dir}: {error.strerror or error}") from error
        return self._open(folder)

    def fingerprint(self) -> str:
        """Paths, sizes and times of both files."""
        return f"binidx:{stamp(self._bin)}:{stamp(self._idx)}"

    def _look(self, folder: Path, tokenizer: Tokenizer, on_progress: Callable[[int], None] | None) -> None:
        """Read all tokens once and write what was found."""
        tokens = np.memmap(self._bin, dtype=self.dtype, mode="r", shape=(self.num_tokens,))
        digest, crcs, ends = hashlib.sha256(), [], []
        num_bytes, size = 0, tokens.itemsize
        for at in range(0, len(tokens), CHUNK // size):
            piece = tokens[at : at + CHUNK // size]
            check_tokens(piece, tokenizer.vocab_size, str(self._bin), at, 0)
            raw = piece.view(np.uint8).data
            digest.update(raw)
            crcs.append(zlib.crc32(raw))
            num_bytes += int(tokenizer.token_bytes[piece].sum())
            if tokenizer.eos_id is not None:
                ends.append(np.flatnonzero(piece == tokenizer.eos_id) + at)
            if on_progress is not None:
                on_progress(num_bytes)
        ended: npt.NDArray[np.int64] = (
            np.concatenate(ends).astype(np.int64) if ends else np.empty(0, np.int64)
        )
        # Two end-of-document tokens in a row hold no document between them.
        begins = ended[:-1][np.diff(ended) > 1] + 1 if len(ended) else ended
        last = ended[-1:] + 1
        inside = np.concatenate([begins, last[last < len(tokens)]])
        starts = np.union1d(self.starts, inside)
        always = bool(len(ended)) and bool(np.isin(starts[1:] - 1, ended).all())
        begin_bytes = npy_header(starts.dtype, len(starts)) + starts.tobytes()
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "starts.npy", begin_bytes)
        index = Index(
            format_version=FORMAT_VERSION,
            source=self.name,
            tokenizer=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id if always else None,
            dtype=self.dtype,
            num_tokens=len(tokens),
            num_documents=len(starts),
            num_bytes=num_bytes,
            byte_exact=tokenizer.is_byte_level,
            tokens_sha256=digest.hexdigest(),
            fingerprint=hashlib.sha256(self.fingerprint().encode(errors="surrogatepass")).hexdigest(),
        )
        findings = Findings(
            format_version=FORMAT_VERSION,
            index=index,
            tokens_crc32=tuple(crcs),
            starts_crc32=tuple(checksums(folder / "starts.npy")),
        )
        replace_json(folder / "findings.json", asdict(replace(findings, crc32=findings.checksum())))

    def _open(self, folder: Path) -> TokenStore:
        path = folder / "findings.json"
        content = read_checked_json(path, "record of a token file", {f.name for f in fields(Findings)})
        try:
            index = Index(**content["index"] | {"shards": tuple(content["index"]["shards"])})
            findings = Findings(**content | {"index": index})
        except (TypeError, KeyError) as error:
            raise DataError(f"{path} does not describe a token file") from error
        if findings.crc32 != findings.checksum():
            raise DataError(f"{path} is damaged: its checksum is not the one that was written")
        size = HEADER_BYTES + 8 * index.num_documents
        begins = CheckedFile(folder / "starts.npy", size, findings.starts_crc32)
        begins.check()
        file = CheckedFile(self._bin, index.num_tokens * np.dtype(self.dtype).itemsize, findings.tokens_crc32)
        files = ShardedTokens([file], [index.num_tokens], self.dtype, 0, _DAMAGED)
        starts = np.array(begins.content[HEADER_BYTES:].view(np.int64))
        return TokenStore(tokens=files.whole, starts=starts, index=index, path=self._bin, files=files)


def binidx(path: Path) -> Binidx | None:
    """The token files that a path names: ``name.bin``, ``name.idx``, or ``name`` where both are there.

    Raises:
        DataError: one of them is missing or damaged.
    """
    if path.suffix in (".bin", ".idx"):
        if path.is_file():
            return Binidx(path.with_suffix(".bin"), path.with_suffix(".idx"))
        return None
    # The name itself may hold dots.
    both = path.with_name(f"{path.name}.bin"), path.with_name(f"{path.name}.idx")
    if path.name and not path.exists() and all(file.is_file() for file in both):
        return Binidx(*both)
    return None


def _read_idx(path: Path, bin_path: Path) -> tuple[str, npt.NDArray[np.int64], int]:
    """Type of the tokens, where documents begin, number of tokens; everything checked against both files."""
    try:
        size, bin_size = path.stat().st_size, bin_path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER)
        content: Any = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if header[: len(MAGIC)] != MAGIC[: len(header)] or size < len(MAGIC):
        raise DataError(f"{path} is no index of tokens: it does not begin with MMIDIDX (byte 0)")
    if size < _HEADER:
        raise DataError(f"{path} is cut off at byte {size}, in its header of {_HEADER} bytes; {_DAMAGED}")
    version, code = int.from_bytes(header[9:17], "little"), header[17]
    if version != 1:
        raise DataError(f"{path} has version {version} (byte 9); expected 1")
    if code not in DTYPES:
        raise DataError(f"{path}: type code {code} (byte 17) is unknown; expected one of {sorted(DTYPES)}")
    sequences, entries = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
    places, documents = _HEADER + 4 * sequences, _HEADER + 12 * sequences
    end = documents + 8 * entries
    if size not in (end, end + sequences):
        problem = "cut off" if size < end else "damaged"
        raise DataError(
            f"{path} is {problem} at byte {min(size, end)}: {sequences} sequences and {entries} document "
            f"entries take {end} bytes and it has {size}"
        )
    lengths = content[_HEADER:places].view("<i4").astype(np.int64)
    dtype = _dtype(path, code, int(lengths.sum()), bin_size)
    width = np.dtype(dtype).itemsize
    pointers = content[places:documents].view("<i8")
    firsts = content[documents:end].view("<i8")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    _refuse_first(lengths < 0, path, _HEADER, 4, lengths, "a sequence has the length {}")
    _refuse_first(
        pointers != offsets[:-1] * width,
        path,
        places,
        8,
        pointers,
        "a sequence lies at byte {} of the tokens and not directly after the one before it",
    )
    if offsets[-1] * width != bin_size:
        problem = "is cut off at" if bin_size < offsets[-1] * width else "does not fit its index after"
        raise DataError(
            f"{bin_path} {problem} byte {min(bin_size, int(offsets[-1] * width))}: {path} describes "
            f"{int(offsets[-1])} tokens of {width} bytes and it has {bin_size} bytes"
        )
    if not offsets[-1]:
        raise DataError(f"{bin_path} holds no tokens")
    outside = (firsts < 0) | (firsts > sequences)
    outside[1:] |= np.diff(firsts) < 0
    _refuse_first(outside, path, documents, 8, firsts, f"a document begins at sequence {{}} of {sequences}")
    if not entries or firsts[0] != 0 or firsts[-1] != sequences:
        raise DataError(
            f"{path} is damaged at byte {documents}: its documents do not cover its {sequences} sequences"
        )
    starts = np.unique(offsets[firsts])
    return dtype, starts[starts < offsets[-1]], int(offsets[-1])


def _dtype(path: Path, code: int, num_tokens: int, bin_size: int) -> str:
    types = DTYPES[code]
    fitting = [name for name in types if np.dtype(name).itemsize * num_tokens == bin_size]
    if not fitting and code in (6, 7) and bin_size in (4 * num_tokens, 8 * num_tokens):
        raise DataError(
            f"{path}: type code {code} (byte 17) stands for floating-point numbers of "
            f"{bin_size // num_tokens} bytes here, which no tokens are"
        )
    return (fitting or types)[0]


def _refuse_first(
    bad: npt.NDArray[np.bool_], path: Path, begin: int, size: int, values: npt.NDArray[Any], problem: str
) -> None:
    if bad.any():
        where = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{path} is damaged at byte {begin + size * where}: {problem.format(int(values[where]))}"
        )
