"""Tokenizers and a source of texts for tests of token stores."""

from __future__ import annotations

from spikelm.data.source import Source
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(["abc abc bca cab é日 " * 30], 280)


class Texts(Source):
    """Documents in memory with a fingerprint of their own; counts how often it is read."""

    def __init__(self, *texts: str) -> None:
        super().__init__("texts")
        self.texts, self.reads = texts, 0

    def _documents(self):
        self.reads += 1
        yield from self.texts

    def fingerprint(self) -> str:
        return repr(self.texts)
