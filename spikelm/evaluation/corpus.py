"""The text a model is measured on: documents, their tokens, and how many bytes each token stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikelm.data.source import Source
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer

STARTS = ("none", "bos", "eos")


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
    """

    name: str
    sha256: str
    bytes: int
    start_token: int | None
    tokens: list[NDArray[np.int32]]
    byte_lengths: list[NDArray[np.float64]]
    rescaled: int

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
    total = rescaled = 0
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
    )
    if corpus.predictions == 0:
        raise DataError(
            f"{source.name} has nothing to score ({len(tokens)} documents, {total} bytes); "
            f"expected at least one document of two tokens"
        )
    return corpus


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
