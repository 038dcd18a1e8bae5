"""The text a plot is drawn over: one document, as tokens and as the strings below a picture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer

_SEARCHED = 1000
"""Documents of a source that are looked at for one that is long enough."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A piece of text.

    Attributes:
        source: where it comes from, for people.
        tokens: ids.
        labels: what each token stands for.
        sha256: of the ids, as decimal numbers with commas.
    """

    source: str
    tokens: list[int]
    labels: list[str]
    sha256: str

    def to_dict(self) -> dict[str, object]:
        """Where the tokens come from, as JSON values (not the text itself)."""
        return {"source": self.source, "tokens": len(self.tokens), "tokens_sha256": self.sha256}


def sample(tokenizer: Tokenizer, text: str, *, most: int, source: str = "text") -> Sample:
    """The first tokens of a text.

    Args:
        tokenizer: the model's.
        text: any text.
        most: tokens at most.
        source: where it comes from.

    Raises:
        ConfigError: ``most`` is not positive.
        DataError: the text has no tokens.
    """
    if most < 1:
        raise ConfigError(f"tokens is {most}; expected at least 1")
    ids = [int(token) for token in tokenizer.encode(text)[:most]]
    if not ids:
        raise DataError(f"{source} has no tokens; expected at least one character of text")
    return Sample(
        source=source,
        tokens=ids,
        labels=[tokenizer.decode([token], skip_special=False) for token in ids],
        sha256=hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(),
    )


def open_sample(tokenizer: Tokenizer, *, text: str | None, data: str | None, most: int) -> Sample:
    """A text given on the command line, or a document of a source.

    Of a source the first document with ``most`` tokens is taken, else the longest among the first thousand.

    Raises:
        ConfigError: both or neither are given.
        DataError: the source does not exist or has no text.
    """
    from spikelm.data.source import open_source

    if (text is None) == (data is None):
        raise ConfigError("give the text by --text or by --data, one of the two")
    if text is not None:
        return sample(tokenizer, text, most=most)
    source = open_source(str(data))
    longest = ""
    for index, document in enumerate(source.documents()):
        if index >= _SEARCHED:
            break
        if len(document) <= len(longest):
            continue
        longest = document
        # A token is at least one byte; cutting first keeps huge documents cheap.
        if len(document) >= most and len(tokenizer.encode(document[: 16 * most])) >= most:
            break
    return sample(tokenizer, longest[: 64 * most], most=most, source=source.name)
