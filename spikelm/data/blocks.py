"""Training samples: blocks of a tokenised source, in an order that depends on the sample's number alone.

The documents stand one after another in one stream of tokens, cut into blocks of T inputs; the targets are
the tokens one further on. Sample g is block ``permutation(seed, g // n)[g % n]``: every epoch sees all n
blocks in another order, whatever the batch size, the number of workers or ranks, or where a run resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spikelm.data.permutation import key, permute
from spikelm.data.samples import IGNORE, Batch, Samples, check_block_length, make_batch
from spikelm.data.source import Source, open_source
from spikelm.data.store import FORMAT_VERSION, Index, TokenStore, tokenise
from spikelm.errors import DataError
from spikelm.tokenizer import TokenArray, Tokenizer

__all__ = ["IGNORE", "Batch", "TokenBlocks"]


class TokenBlocks(Samples):
    """Blocks of ``block_length`` tokens of a store.

    The last tokens that fill no whole block are left out. A document's last token predicts the next
    document's first only where an end-of-document token stands between them; otherwise its target is -100.

    Attributes:
        tokens: the stream, 1-D; as on disk, where ``store.read`` checks what it returns.
        starts: int64, where each document begins in it.
        num_tokens, num_bytes: tokens (end-of-document tokens included) and UTF-8 bytes of all documents.
        num_blocks: samples in one epoch.
        eos_id: the end-of-document token in the stream, or None.

    Raises:
        DataError: the store is of another tokenizer, holds a token outside the vocabulary, or is too short.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, block_length: int) -> None:
        self.block_length = check_block_length(block_length)
        check_tokenizer(store, tokenizer)
        self.store, self.tokenizer, self.carried = store, tokenizer, False
        self.tokens, self.starts = store.tokens, store.starts
        self.num_tokens: int = store.index.num_tokens
        self.num_bytes: int = store.index.num_bytes
        self.eos_id = store.index.eos_id
        self.num_blocks = (self.num_tokens - 1) // block_length
        if self.num_blocks < 1:
            raise DataError(
                f"{store.index.source} holds {self.num_tokens} tokens, fewer than one block of "
                f"{block_length} and the token after it; give more text or a shorter block"
            )

    @classmethod
    def build(
        cls,
        source: Source | str | Path,
        tokenizer: Tokenizer,
        block_length: int,
        cache_dir: str | Path | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> TokenBlocks:
        """Tokenise ``source`` (or take it from the cache) and cut it into blocks; see :func:`tokenise`."""
        if not isinstance(source, Source):
            source = open_source(source)
        store = tokenise(source, tokenizer, Path(cache_dir) if cache_dir else None, on_progress)
        return cls(store, tokenizer, block_length)

    @classmethod
    def from_documents(
        cls, documents: Iterable[str], tokenizer: Tokenizer, block_length: int, name: str = "the documents"
    ) -> TokenBlocks:
        """Blocks of documents in memory, nothing written to disk."""
        texts = [text for text in documents if text]
        ending = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        arrays = [
            np.append(ids, ending).astype(tokenizer.dtype)
            for ids in tokenizer.encode_arrays(texts)
            if len(ids)  # a tokenizer may drop what it does not know
        ]
        tokens: TokenArray = np.concatenate(arrays) if arrays else np.empty(0, tokenizer.dtype)
        starts = np.cumsum([0, *(len(ids) for ids in arrays)], dtype=np.int64)[:-1]
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        index = Index(
            format_version=FORMAT_VERSION,
            source=name,
            tokenizer=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=tokenizer.dtype.name,
            num_tokens=len(tokens),
            num_documents=len(arrays),
            num_bytes=num_bytes,
            byte_exact=int(tokenizer.token_bytes[tokens].sum()) == num_bytes,
            tokens_sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        )
        return cls(TokenStore(tokens=tokens, starts=starts, index=index), tokenizer, block_length)

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of a token."""
        return self.num_bytes / self.num_tokens

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.starts)

    def document(self, number: int) -> TokenArray:
        """Tokens of one document, its end-of-document token included."""
        if not 0 <= number < self.num_documents:
            raise DataError(f"document {number} does not exist; there are {self.num_documents}")
        end = self.starts[number + 1] if number + 1 < self.num_documents else self.num_tokens
        return self.store.read(int(self.starts[number]), int(end))

    def gather(self, seed: int, samples: npt.NDArray[np.int64]) -> Batch:
        """The samples with these global numbers, int64 [B]; a rank passes its share of a batch."""
        epoch, position = np.divmod(samples, self.num_blocks)
        return self.blocks(permute(position, self.num_blocks, key(seed, epoch)), samples)

    def blocks(self, numbers: npt.NDArray[np.int64], samples: npt.NDArray[np.int64] | None = None) -> Batch:
        """The blocks with these numbers, int64 [B], in the order of the text."""
        length = self.block_length
        offsets = numbers * length
        window = np.empty((len(numbers), length + 1), dtype=np.int64)
        for row, offset in enumerate(offsets.tolist()):
            window[row] = self.store.read(offset, offset + length + 1)
        return make_batch(
            window,
            self._begins(offsets),
            numbers if samples is None else samples,
            self.tokenizer,
            self.eos_id is not None,
            name_of(self.store),
            offsets,
        )

    def fingerprint(self) -> str:
        """Hash of the tokens."""
        return self.store.index.tokens_sha256

    def describe(self) -> dict[str, Any]:
        """See :class:`Samples`."""
        return {
            "kind": "blocks",
            "source": self.store.index.source,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "blocks": self.num_blocks,
        }

    def epochs(self, seed: int, samples: int) -> dict[str, float]:
        """See :class:`Samples`."""
        return {self.store.index.source: samples / self.num_blocks}

    def _begins(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Bool [B, T + 1]: where a document begins in the window of each block."""
        width = self.block_length + 1
        begins = np.zeros((len(offsets), width), dtype=bool)
        first = np.searchsorted(self.starts, offsets)
        last = np.searchsorted(self.starts, offsets + width)
        for row in np.flatnonzero(last > first):
            begins[row, self.starts[first[row] : last[row]] - offsets[row]] = True
        return begins

    def __len__(self) -> int:
        return self.num_blocks

    def __repr__(self) -> str:
        return (
            f"TokenBlocks({self.store.index.source}, {self.num_tokens} tokens in {self.num_documents} "
            f"documents, {self.num_blocks} blocks of {self.block_length})"
        )


def check_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    """Refuse tokens that another tokenizer made.

    Raises:
        DataError: naming the source.
    """
    if store.index.tokenizer != tokenizer.sha256:
        raise DataError(
            f"{name_of(store)} was written with tokenizer {store.index.tokenizer[:12]}, not {tokenizer!r}"
        )


def name_of(store: TokenStore) -> str:
    """Source and place of a store, for messages."""
    return f"{store.index.source} ({store.where})"
