"""How a trainer tells what it does; the command line passes its progress bar, tests pass nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """Progress of one piece of work (``spikelm.cli._common`` has a live and a plain one)."""

    def advance(self, amount: float = 1) -> None:
        """Count work as done."""

    def note(self, text: str) -> None:
        """Show figures beside the bar."""

    def say(self, text: str) -> None:
        """Print a line of text above the bar."""


class ProgressFactory(Protocol):
    """Opens a bar: title, amount of work, its unit, and the amount done before."""

    def __call__(
        self, title: str, total: float | None = None, unit: str = "it", done: float = 0
    ) -> AbstractContextManager[Bar]:
        """A context manager whose value is the bar."""


class _Silent:
    def advance(self, amount: float = 1) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to show."""

    def say(self, text: str) -> None:
        """Nothing to show."""


@contextmanager
def silent_progress(
    title: str, total: float | None = None, unit: str = "it", done: float = 0
) -> Iterator[Bar]:
    """A bar that shows nothing."""
    yield _Silent()


def printable(text: str) -> str:
    """Text without control characters: an untrained model may write what would upset a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
