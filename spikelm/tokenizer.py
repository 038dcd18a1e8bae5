"""Tokenizers: bytes, characters, any Hugging Face ``tokenizer.json``, or a byte-level BPE trained here.

One class over the ``tokenizers`` library, which is imported only when needed: the byte tokenizer runs on
numpy alone. What the rest of the package relies on:

- ``encode_arrays`` (data) treats text as text: ``<|endoftext|>`` written in a document is those thirteen
  characters, never the special token. ``encode`` (prompts) recognises special tokens, as other libraries do.
- No token is added on its own (no bos, no eos) and nothing is truncated, whatever the file asks for.
- ``token_bytes`` gives the UTF-8 bytes each token stands for, so that nats per token become bits per byte.
- ``sha256`` identifies the tokenizer: hash of its canonical JSON, the same after saving and loading.
"""

from __future__ import annotations

import builtins
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spikelm.data import vocabulary, vocabulary_training
from spikelm.data.compressed import decode_utf8, read_bytes
from spikelm.data.decode_stream import ByteStream, DecodeStream, TextStream
from spikelm.data.plain_text import checked, split_lines, utf8
from spikelm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

TokenArray = npt.NDArray[np.unsignedinteger[Any]]

EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|bos|>", "[BOS]")
_GROUP_CHARS = 1 << 20  # text handed to the library at once


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: 1 + the highest id (unused ids included).
        eos_id, bos_id: ids of the end and the beginning of a document, or None.
        chat_template: Jinja chat template kept with the tokenizer, or None.
        is_bytes: whether ids are the byte values themselves.

    Args:
        spec: content of a ``tokenizer.json``.
        config: content of the ``tokenizer_config.json`` beside it (names of bos and eos), if any.
        chat_template: Jinja chat template to keep with the tokenizer, if any.
        where: what to call it in error messages.

    Raises:
        DataError: the specification is not a tokenizer.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        where: str = "tokenizer.json",
    ) -> None:
        if not isinstance(spec, Mapping) or not isinstance(spec.get("model"), Mapping):
            raise DataError(f"{where} is no tokenizer: expected a JSON object with the key 'model'")
        # Truncation would silently cut documents and padding would add tokens: neither is ours to do.
        self._spec = dict(spec) | {"truncation": None, "padding": None}
        self._config = dict(config or {})
        self._where = where
        self.chat_template = chat_template
        self._vocab, self._added = vocabulary.vocabulary(self._spec, where)
        self.is_bytes = vocabulary.is_byte_vocabulary(self._spec, self._vocab)
        if not self.is_bytes:
            _ = self._core  # a damaged file is reported here and not at the first use
        self.vocab_size = 1 + max([*self._vocab.values(), *self._added], default=-1)
        if self.vocab_size == 0:
            raise DataError(f"{where} has an empty vocabulary")
        self.eos_id = self._special_id("eos_token", EOS_NAMES)
        self.bos_id = self._special_id("bos_token", BOS_NAMES)

    # --- making one -------------------------------------------------------------------------------------

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The byte tokenizer: 256 ids that equal the byte values, no special tokens."""
        vocab = {char: value for value, char in enumerate(vocabulary.byte_alphabet())}
        spec = vocabulary.byte_level_spec(vocab, merges=[], use_regex=False)
        return cls(spec, where="the byte tokenizer")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json`` (plain or compressed) and the ``tokenizer_config.json`` beside it."""
        path = Path(path)
        return cls(vocabulary.read_json(path), *_companions(path.parent), where=str(path))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a folder in Hugging Face layout: tokenizer.json, or vocab.json and merges.txt."""
        folder = Path(folder)
        if path := vocabulary.find(folder, "tokenizer.json"):
            return cls.from_file(path)
        for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            vocab_file, merges_file = (
                vocabulary.find(folder, vocab_name),
                vocabulary.find(folder, merges_name),
            )
            if vocab_file and merges_file:
                config, template = _companions(folder)
                spec = vocabulary.read_vocab_and_merges(folder, vocab_file, merges_file, config)
                return cls(spec, config, template, where=str(vocab_file))
        raise DataError(
            f"folder {folder} holds no tokenizer: expected tokenizer.json, or vocab.json with merges.txt"
        )

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """``"bytes"``, a tokenizer.json file, or a folder that holds a tokenizer."""
        path = Path(source)
        if path.is_dir():
            return cls.from_folder(path)
        if path.is_file():
            return cls.from_file(path)
        if str(source) == "bytes":
            return cls.bytes()
        raise DataError(
            f"there is no tokenizer {source}; give 'bytes', a tokenizer.json file or a folder that holds one"
        )

    @classmethod
    def train_bpe(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = ("<|endoftext|>",),
        min_frequency: int = 2,
        show_progress: bool = False,
    ) -> Tokenizer:
        """Train a byte-level BPE (GPT-2 splitting, all 256 bytes in the vocabulary, so no unknown token).

        Special tokens take the first ids. Little text may give fewer tokens than asked for.

        Raises:
            DataError: ``vocab_size`` leaves no room for the bytes, or the special tokens repeat.
        """
        spec = vocabulary_training.bpe(texts, vocab_size, special_tokens, min_frequency, show_progress)
        return cls(spec, where="the trained tokenizer")

    @classmethod
    def characters(
        cls,
        texts: Iterable[str],
        vocab_size: int | None = None,
        *,
        special_tokens: Sequence[str] = (),
        min_frequency: int = 1,
    ) -> Tokenizer:
        """A tokenizer of characters: one token each, and the UTF-8 bytes of those that have none.

        Nothing is unknown, so every text comes back as it was. All of ASCII and 128 bytes are always there.

        Args:
            texts: where the characters are counted.
            vocab_size: tokens at most, special ones included: the most frequent characters stay. None: all.
            special_tokens: take the first ids.
            min_frequency: characters seen less often have no token.

        Raises:
            DataError: ``vocab_size`` leaves no room for ASCII and the bytes, or the special tokens repeat.
        """
        spec = vocabulary_training.characters(texts, vocab_size, special_tokens, min_frequency)
        return cls(spec, where="the character tokenizer")

    @staticmethod
    def check_training(vocab_size: int, special_tokens: Sequence[str]) -> None:
        """Raise :class:`DataError` where :meth:`train_bpe` would, before any text is read."""
        vocabulary_training.check_training(vocab_size, special_tokens)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self._config.items() if key != "chat_template"}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key, token in (("eos_token", self.eos_id), ("bos_token", self.bos_id)):
            if token is not None:
                config[key] = self._name(token)
        (folder / "tokenizer.json").write_text(json.dumps(self._spec, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    # --- text to tokens ---------------------------------------------------------------------------------

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised unless ``parse_special`` is off."""
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """Token ids of several texts; raises :class:`DataError` for text that is not Unicode."""
        if self.is_bytes:
            return [list(utf8(text)) for text in texts]
        core = self._core if parse_special else self._plain_core
        encodings = core.encode_batch_fast([checked(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_arrays(self, texts: Iterable[str]) -> Iterator[TokenArray]:
        """One array of ids (:attr:`dtype`) per text, special tokens not recognised; for data of any size.

        Long texts are cut where the result cannot change and short ones are grouped, so that memory stays
        small and all cores work.
        """
        if self.is_bytes:
            for text in texts:
                yield np.frombuffer(utf8(text), dtype=np.uint8).astype(self.dtype)
            return
        waiting: list[list[str]] = []  # the parts of each text
        size = 0
        for text in texts:
            waiting.append(list(split_lines(text)) if self.splits_at_lines else [text])
            size += len(text)
            if size >= _GROUP_CHARS:
                yield from self._encode_parts(waiting)
                waiting, size = [], 0
        yield from self._encode_parts(waiting)

    def encode_array(self, text: str) -> TokenArray:
        """Ids of one text as an array; see :meth:`encode_arrays`."""
        return next(self.encode_arrays([text]))

    # --- tokens to text ---------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not valid UTF-8 become U+FFFD; special tokens are left out."""
        tokens = [self._known(token) for token in ids]
        if self.is_byte_level:
            pieces = self._pieces if skip_special else self._pieces_with_special
            return b"".join(pieces[token] for token in tokens).decode("utf-8", errors="replace")
        text: str = self._core.decode(tokens, skip_special_tokens=skip_special)
        return text

    def decode_stream(self, *, skip_special: bool = True) -> DecodeStream:
        """Decoder for tokens that arrive one by one; it never splits a multi-byte character."""
        if self.is_byte_level:
            pieces = self._pieces if skip_special else self._pieces_with_special
            return ByteStream(lambda token: pieces[self._known(token)])
        return TextStream(lambda ids: self.decode(ids, skip_special=skip_special))

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, int64 [vocab_size]; special tokens and unused ids count 0.

        Exact for byte-level tokenizers (:attr:`is_byte_level`). For others it is the length of the token's
        own text, which may differ from the document where the tokenizer changes spaces.
        """
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    # --- what it is -------------------------------------------------------------------------------------

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The smaller of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16) if self.vocab_size <= 65536 else np.dtype(np.uint32)

    @property
    def is_byte_level(self) -> bool:
        """True when every token is a fixed string of bytes (GPT-2's scheme, or characters): all made here."""
        return vocabulary.is_byte_level(self._spec)

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical JSON (sorted keys, no spaces) as 64 hexadecimal digits."""
        canonical = json.dumps(self._spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def spec(self) -> Mapping[str, Any]:
        """Content of its ``tokenizer.json``; a tokenizer made from it gives the same tokens."""
        return self._spec

    def __repr__(self) -> str:
        return f"Tokenizer({self._where}, {self.vocab_size} ids, sha256 {self.sha256[:12]})"

    # --- inside -----------------------------------------------------------------------------------------

    @cached_property
    def _core(self) -> tokenizers.Tokenizer:
        library = vocabulary_training.tokenizers_library()
        try:
            core: tokenizers.Tokenizer = library.Tokenizer.from_str(json.dumps(self._spec))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self._where} is no usable tokenizer: {error}") from error
        return core

    @cached_property
    def _plain_core(self) -> tokenizers.Tokenizer:
        core: tokenizers.Tokenizer = vocabulary_training.tokenizers_library().Tokenizer.from_str(
            json.dumps(self._spec)
        )
        core.encode_special_tokens = True  # "encode special tokens as text", in that library's words
        return core

    @cached_property
    def splits_at_lines(self) -> bool:
        """Whether cutting text as :func:`split_lines` does leaves the tokens as they are."""
        before = self._spec.get("pre_tokenizer") or {}
        parts = before.get("pretokenizers", [before])
        splits = any(part.get("type") == "Split" or part.get("use_regex", True) for part in parts)
        prefix = any(part.get("add_prefix_space", False) for part in parts)
        added = self._added.values()
        strips = any(t.get("lstrip") or t.get("rstrip") or "\n" in t["content"] for t in added)
        if not (self.is_byte_level and splits) or prefix or strips:
            return False
        ends, starts = ("a\n", "a.\n", "1\n", ")\n", "é\n"), ("b", "Bc d")
        return all(
            self.encode(end + start, parse_special=False)
            == self.encode(end, parse_special=False) + self.encode(start, parse_special=False)
            for end in ends
            for start in starts
        )

    def _encode_parts(self, texts: list[list[str]]) -> Iterator[TokenArray]:
        """One array per text (a list of parts); about ``_GROUP_CHARS`` are encoded at once."""

        def encoded() -> Iterator[TokenArray]:
            group: list[str] = []
            size = 0
            for part in itertools.chain.from_iterable(texts):
                if group and size + len(part) > _GROUP_CHARS:
                    yield from self._arrays(group)
                    group, size = [], 0
                group.append(part)
                size += len(part)
            yield from self._arrays(group)

        arrays = encoded()
        for parts in texts:
            own = list(itertools.islice(arrays, len(parts)))
            yield np.concatenate(own) if own else np.empty(0, dtype=self.dtype)

    def _arrays(self, texts: list[str]) -> list[TokenArray]:
        return [np.array(ids, dtype=self.dtype) for ids in self.encode_batch(texts, parse_special=False)]

    def _special_id(self, key: str, names: Sequence[str]) -> int | None:
        special = {token["content"]: i for i, token in self._added.items() if token.get("special")}
        configured = self._config.get(key)
        if isinstance(configured, Mapping):
            configured = configured.get("content")
        if isinstance(configured, str):
            return special.get(configured, self._vocab.get(configured))
        return next((special[name] for name in names if name in special), None)

    def _name(self, token: int) -> str:
        if token in self._added:
            return str(self._added[token]["content"])
        return next(name for name, i in self._vocab.items() if i == token)

    def _known(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is outside the vocabulary of {self.vocab_size} ids")
        return int(token)

    @cached_property
    def _pieces(self) -> list[builtins.bytes]:
        return vocabulary.pieces(self._spec, self._vocab, self._added, self.vocab_size)

    @cached_property
    def _pieces_with_special(self) -> list[builtins.bytes]:
        pieces = list(self._pieces)
        for i, token in self._added.items():
            pieces[i] = token["content"].encode("utf-8")
        return pieces


def _companions(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Content of tokenizer_config.json (or nothing) and the chat template beside a tokenizer."""
    path = vocabulary.find(folder, "tokenizer_config.json")
    config = vocabulary.read_json(path) if path else {}
    if path := vocabulary.find(folder, "chat_template.jinja"):
        return config, decode_utf8(read_bytes(path), str(path))
    template = config.get("chat_template")
    return config, template if isinstance(template, str) else None
