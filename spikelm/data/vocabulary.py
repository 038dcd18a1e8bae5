"""The files of a tokenizer: tokenizer.json and its older forms, and the bytes that tokens stand for.

The functions read and build the JSON object of the ``tokenizers`` library (``spec``) without that library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikelm.data.compressed import COMPRESSED_SUFFIXES, decode_utf8, read_bytes
from spikelm.errors import DataError

# The pre-tokenizer of Qwen 2 and later, whose vocab.json and merges.txt do not carry it.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's scheme).

    Bytes that print as themselves in Latin-1 keep their character; the others, in order, take U+0100 on.
    """
    keep = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(value) if value in keep else chr(next(others)) for value in range(256)]


_BYTE_OF = {char: value for value, char in enumerate(byte_alphabet())}


def byte_level_spec(
    vocab: Mapping[str, int], merges: list[list[str]], *, use_regex: bool, split: str | None = None
) -> dict[str, Any]:
    """Specification of a byte-level BPE.

    Args:
        vocab: token (in the byte alphabet) to id.
        merges: pairs of tokens, most frequent first.
        use_regex: split words as GPT-2 does.
        split: a regular expression that splits words instead; then text is normalised to NFC first (Qwen).
    """

    def byte_level(use_regex: bool) -> dict[str, Any]:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}

    before = byte_level(use_regex)
    if split is not None:
        pattern = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [pattern, before]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if split is not None else None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": byte_level(True),
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": merges},
    }


def is_byte_vocabulary(spec: Mapping[str, Any], vocab: Mapping[str, int]) -> bool:
    """Whether every id is the value of the byte it stands for, so that encoding is a copy."""
    before = spec.get("pre_tokenizer") or {}
    return (
        dict(vocab) == _BYTE_OF
        and is_byte_level(spec)
        and not spec.get("added_tokens")
        and not spec.get("normalizer")
        and not spec["model"].get("merges")
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space", False)
    )


def is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether every token is a fixed string of bytes."""
    decoder = spec.get("decoder")
    byte_level = isinstance(decoder, Mapping) and decoder.get("type") == "ByteLevel"
    return byte_level or is_character_level(spec)


_BYTE_FALLBACK = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}


def character_spec(characters: Iterable[str], special_tokens: Sequence[str] = ()) -> dict[str, Any]:
    """Specification of a tokenizer of characters that knows no unknown one.

    Ids: the special tokens, the 128 characters of ASCII, the 128 bytes above them (what another character's
    UTF-8 consists of), then ``characters``.

    Args:
        characters: those beyond ASCII that have an id of their own, most frequent first.
        special_tokens: as ``<|endoftext|>``.
    """
    names = [*map(chr, range(128)), *(f"<0x{value:02X}>" for value in range(128, 256)), *characters]
    first = len(special_tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, {"content": content, "special": True}) for i, content in enumerate(special_tokens)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _BYTE_FALLBACK,
        "model": {
            "type": "BPE",
            "vocab": {
                **{content: i for i, content in enumerate(special_tokens)},
                **{name: first + i for i, name in enumerate(names)},
            },
            "merges": [],
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": True,
        },
    }


def is_character_level(spec: Mapping[str, Any]) -> bool:
    """Whether this is a specification as :func:`character_spec` makes them."""
    model = spec["model"]
    vocab = model.get("vocab")
    if not (
        isinstance(vocab, Mapping)
        and model.get("byte_fallback")
        and not model.get("merges")
        and spec.get("decoder") == _BYTE_FALLBACK
        and not any(spec.get(key) for key in ("normalizer", "pre_tokenizer"))
    ):
        return False
    special = {token.get("content") for token in spec.get("added_tokens") or []}
    return all(len(name) == 1 or _byte_of(name) is not None or name in special for name in vocab)


def vocabulary(spec: Mapping[str, Any], where: str) -> tuple[dict[str, int], dict[int, dict[str, Any]]]:
    """Tokens of the model (name to id) and added tokens (id to description).

    Raises:
        DataError: the specification is damaged; ``where`` names it.
    """
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list)}
    if not isinstance(vocab, Mapping) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise DataError(f"{where} is no tokenizer: expected model.vocab to map tokens to ids from 0")
    try:
        added = {int(token["id"]): dict(token) for token in spec.get("added_tokens") or []}
        if not all(isinstance(token["content"], str) and i >= 0 for i, token in added.items()):
            raise TypeError("content is not text or id is negative")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} has an added token without id or content ({error})") from error
    return dict(vocab), added


def pieces(
    spec: Mapping[str, Any], vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], size: int
) -> list[bytes]:
    """UTF-8 bytes of every id; empty for special tokens and ids that are not used."""
    result = [b""] * size
    piece_of = _text_piece
    if is_character_level(spec):
        piece_of = _character_piece
    elif is_byte_level(spec):
        piece_of = _byte_level_piece
    for name, i in vocab.items():
        result[i] = piece_of(name)
    for i, token in added.items():
        result[i] = b"" if token.get("special") else token["content"].encode("utf-8")
    return result


def read_vocab_and_merges(
    folder: Path, vocab_file: Path, merges_file: Path, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Specification from vocab.json and merges.txt (GPT-2; Qwen where ``config`` names its class)."""
    vocab = read_json(vocab_file)
    merges = []
    for number, line in enumerate(decode_utf8(read_bytes(merges_file), str(merges_file)).split("\n"), 1):
        if line.strip() and not (number == 1 and line.startswith("#version")):
            pair = line.rstrip("\r").split(" ")
            if len(pair) != 2:
                raise DataError(f"{merges_file} line {number}: expected two tokens separated by a space")
            merges.append(pair)
    split = QWEN_SPLIT if str(config.get("tokenizer_class", "")).startswith("Qwen") else None
    spec = byte_level_spec(vocab, merges, use_regex=split is None, split=split)
    described = config.get("added_tokens_decoder")
    if isinstance(described, Mapping):
        added = [_added_token(int(i), token) for i, token in described.items()]
    else:
        found = (read_json(path) if (path := find(folder, "added_tokens.json")) else {}) | {
            name: vocab[name] for name in ("<|endoftext|>",) if name in vocab
        }
        added = [_added_token(i, {"content": content, "special": True}) for content, i in found.items()]
    spec["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return spec


def find(folder: Path, name: str) -> Path | None:
    """``folder/name``, plain or compressed, or None."""
    candidates = [folder / name, *(folder / (name + suffix) for suffix in COMPRESSED_SUFFIXES)]
    return next((path for path in candidates if path.is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path`` (plain or compressed); raises :class:`DataError` for anything else."""
    try:
        content = json.loads(decode_utf8(read_bytes(path), str(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a JSON {type(content).__name__} where an object was expected")
    return content


def _added_token(token: int, description: Mapping[str, Any]) -> dict[str, Any]:
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return flags | dict(description) | {"id": token}


def _byte_level_piece(name: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in name)
    except KeyError:  # a token outside the scheme is kept as its text, as the decoder does
        return name.encode("utf-8")


def _byte_of(name: str) -> bytes | None:
    """The byte that ``<0xNN>`` stands for, or None for another name."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            return None
    return None


def _character_piece(name: str) -> bytes:
    return _byte_of(name) or name.encode("utf-8")


def _text_piece(name: str) -> bytes:
    if (byte := _byte_of(name)) is not None:
        return byte
    return name.removeprefix("##").replace("\u2581", " ").encode("utf-8")
