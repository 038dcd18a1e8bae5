"""A folder that holds a token store, as a source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spikelm.data import writing
from spikelm.data.source import TokenSource
from spikelm.data.store import TokenStore, open_store
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer


class StoredTokens(TokenSource):
    """A complete token store, opened where it is.

    Attributes:
        store: the tokens.

    Args:
        path: its folder.

    Raises:
        DataError: it is damaged.
    """

    kind = "token store"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.store = open_store(path)

    def open_tokens(
        self, tokenizer: Tokenizer, cache_dir: Path, on_progress: Callable[[int], None] | None
    ) -> TokenStore:
        """See :class:`TokenSource`."""
        index = self.store.index
        if index.tokenizer != tokenizer.sha256:
            raise DataError(
                f"{self.name} was written with tokenizer {index.tokenizer[:12]} ({index.vocab_size} ids), "
                f"not with {tokenizer!r}; use the one it was made with, or tokenise its text "
                f"({index.source}) again"
            )
        return self.store

    def fingerprint(self) -> str:
        """The hash of the tokens."""
        return f"tokens:{self.store.index.tokens_sha256}"


def stored_tokens(folder: Path) -> StoredTokens | None:
    """The token store in a folder; None where it holds something else.

    Raises:
        DataError: the store is damaged or unfinished.
    """
    if _is_store(folder):
        return StoredTokens(folder)
    if (folder / writing.PLAN).is_file() and (plan := writing.read_plan(folder)) is not None:
        raise DataError(
            f"{folder} is an unfinished token store of {plan.source}; "
            "give the same command that began it again"
        )
    return None


def _is_store(folder: Path) -> bool:
    """Whether an index of tokens lies there; a folder of text may hold a file of that name too."""
    path = folder / "index.json"
    if not path.is_file():
        return False
    if (folder / "00000").is_dir():
        return True
    try:
        return b'"tokens_sha256"' in path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
