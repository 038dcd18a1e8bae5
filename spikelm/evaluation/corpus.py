"""The text a model is measured on: documents, their tokens, and how many bytes each token stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikelm.data.source import Source
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer

STARTS = ("none", "bos", "eos")
SAMPLE = 2000
"""Characters of the first document that are kept for pictures of a report."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenised documents.

    Args:
        name: where the text comes from.
        sha256: hash of the documents as UTF-8, each after its length, so that their boundaries count.
        bytes: UTF-8 bytes of the text.
        start_token: id put before every document, or None; without one its first token is not scored.
        tokens: per document int32 [N], the start token included.
        byte_lengths: per document float64 [N], bytes each token stands for; they add up to the document's.
        rescaled: documents whose tokens' own bytes do not add up to the document's (tokenizers that change
            the text); their lengths are scaled so that the sum is right.
        characters: Unicode characters that the scored tokens stand for: all but those whose first byte is in
            a document's first token, where that one is not scored. None where nobody counted.
        sample: how the first document begins.
    """

    name: str
    sha256: str
    bytes: int
    start_token: int | None
    tokens: list[NDArray[np.int32]]
    byte_lengths: list[NDArray[np.float64]]
    rescaled: int
    characters: int | None = None
    sample: str = ""

    @property
    def predictions(self) -> int:
        """Tokens that are scored: all but the first of every document (a start token included)."""
        return sum(max(len(tokens) - 1, 0) for tokens in self.tokens)


def start_token(tokenizer: Tokenizer, choice: str) -> int | None:
    """The token put before every document.

    Args:
        tokenizer: may have a beginning-of-text or an end-of-text token.
        choice: ``bos``, ``eos`` or ``none``. Training resets the state before a document's own first token,
            so ``none`` is what models trained here have seen; models trained on one stream of documents
            have seen ``eos`` (or ``bos``) before a document.

    Raises:
        ConfigError: if the choice is unknown or the tokenizer has no such token.
    """
    if choice not in STARTS:
        raise ConfigError(f"start token {choice!r}; expected one of {', '.join(STARTS)}")
    if choice == "none":
        return None
    options = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    if options[choice] is None:
        raise ConfigError(f"the tokenizer has no {choice} token; use --start none")
    return options[choice]


def read_corpus(
    source: Source, tokenizer: Tokenizer, *, start: str = "none", max_bytes: int | None = None
) -> Corpus:
    """Read and tokenise a source.

    Args:
        source: gives documents.
        tokenizer: the checkpoint's.
        start: see :func:`start_token`.
        max_bytes: stop after this many bytes of text; the last document is cut there, at a character.

    Raises:
        ConfigError: if ``max_bytes`` is not positive, or the start token does not exist.
        DataError: if no document has a token that can be scored.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max-bytes is {max_bytes}; expected a positive number")
    first = start_token(tokenizer, start)
    prefix = [] if first is None else [first]
    lengths_of = tokenizer.token_bytes.astype(np.float64)
    digest = hashlib.sha256()
    tokens: list[NDArray[np.int32]] = []
    byte_lengths: list[NDArray[np.float64]] = []
    total = rescaled = characters = 0
    sample = ""
    for text in _limited(source.documents(), max_bytes):
        raw = text.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "little") + raw)
        total += len(raw)
        ids = np.asarray(tokenizer.encode_array(text), dtype=np.int32)
        lengths = lengths_of[ids]
        if len(ids) and lengths.sum() != len(raw):
            rescaled += 1
            spread = lengths if lengths.sum() > 0 else np.ones(len(ids))
            lengths = spread * (len(raw) / spread.sum())
        if first is not None:
            characters += len(text)
        elif len(ids) > 1:
            # The first token is not scored, so characters that begin in its bytes are not either.
            characters += len(text) - _characters(raw[: round(lengths[0])])
        sample = sample or text[:SAMPLE]
        tokens.append(np.concatenate([np.asarray(prefix, np.int32), ids]))
        byte_lengths.append(np.concatenate([np.zeros(len(prefix)), lengths]))
    corpus = Corpus(
        name=source.name,
        sha256=digest.hexdigest(),
        bytes=total,
        start_token=first,
        tokens=tokens,
        byte_lengths=byte_lengths,
        rescaled=rescaled,
        characters=characters,
        sample=sample,
    )
    if corpus.predictions == 0:
        raise DataError(
            f"{source.name} has nothing to score ({len(tokens)} documents, {total} bytes); "
            f"expected at least one document of two tokens"
        )
    return corpus


def tokenizer_for(checkpoint: Path, choice: str | None, warn: Callable[[str], None]) -> Tokenizer:
    """The checkpoint's tokenizer, or ``choice`` in its place, with a warning where the two differ.

    Args:
        checkpoint: checkpoint folder; its configuration is read first, so that a wrong folder is told as one.
        choice: a tokenizer to take instead, or None.
        warn: called with a sentence where ``choice`` is not the tokenizer saved with the checkpoint.

    Raises:
        CheckpointError: ``checkpoint`` is no checkpoint folder.
        DataError: there is no such tokenizer, or it has more tokens than the model.
    """
    from spikelm.checkpoint import load_tokenizer, read_config

    config = read_config(checkpoint)
    if choice is None:
        try:
            return load_tokenizer(checkpoint)
        except DataError as error:  # converted weights may have none
            raise DataError(f"{error}; name the one the model was trained with by --tokenizer") from error
    words = Tokenizer.load(choice)
    if words.vocab_size > config.vocab_size:
        raise DataError(
            f"the tokenizer has {words.vocab_size} tokens and the model only {config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    try:
        own = load_tokenizer(checkpoint)
    except DataError:  # converted weights may have none, and then there is nothing to compare
        return words
    if own.sha256 != words.sha256:
        warn(
            f"tokenizer {choice} is not the one saved with {checkpoint}; the result means little unless the "
            "model was trained with it"
        )
    return words


def _characters(raw: bytes) -> int:
    """Characters that begin in these bytes of UTF-8: all bytes but those that continue one (10xxxxxx)."""
    return int(np.count_nonzero((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80))


def _limited(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    left = max_bytes
    for text in documents:
        if left is None:
            yield text
            continue
        raw = text.encode("utf-8")
        if len(raw) >= left:
            cut = raw[:left].decode("utf-8", errors="ignore")
            if cut:
                yield cut
            return
        left -= len(raw)
        yield text
