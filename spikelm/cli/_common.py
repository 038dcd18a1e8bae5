"""What every command shares: the ``--json`` option, tables on standard output, progress on standard error.

Results go to standard output and everything else (progress, warnings, errors) to standard error, so that a
command can stand in a pipe.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from spikelm.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from spikelm.tokenizer import Tokenizer

JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the result as JSON to FILE ('-': standard output)."
    ),
]

_DELAY = 2.0  # seconds before plain progress lines begin: shorter work needs none
_GROWTH = 1.5  # the pause between plain lines grows by this factor, so long work leaves a short log
_LONGEST_PAUSE = 60.0


def console(stderr: bool = False) -> Console:
    """A rich console on standard output (or error); wide enough for tables when not on a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 120
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=not stream.isatty())


def warn(message: str) -> None:
    """One line of warning on standard error."""
    print(f"spikelm: warning: {message}", file=sys.stderr, flush=True)


def tokenizer_for(checkpoint: Path, choice: str | None) -> Tokenizer:
    """The checkpoint's tokenizer, or ``choice`` in its place, with a warning where the two differ.

    Args:
        checkpoint: checkpoint folder; its configuration is read first, so that a wrong folder is told as one.
        choice: what ``--tokenizer`` named, or None.

    Raises:
        CheckpointError: ``checkpoint`` is no checkpoint folder.
        DataError: there is no such tokenizer, or it has more tokens than the model.
    """
    from spikelm.evaluation import corpus

    return corpus.tokenizer_for(checkpoint, choice, warn)


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a command's result as JSON; nothing happens when no file was asked for.

    Numbers that are not finite become null, because JSON has no word for them.

    Args:
        path: target; ``-`` is standard output; missing folders are created.
        result: JSON values, and paths, numpy scalars and tensors of one element.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def human_count(value: float) -> str:
    """A count in at most five characters: 215399424 -> ``215M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def human_bytes(value: float) -> str:
    """A number of bytes with a binary unit: 1536 -> ``1.5 KiB``."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def human_time(seconds: float) -> str:
    """A duration: 3725 -> ``1:02:05``."""
    if not math.isfinite(seconds):
        return "-:--"
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, amount: float = 1) -> None:
        """Count work as done."""

    def note(self, text: str) -> None:
        """Show figures beside the bar, for example ``"loss 2.31, bits/byte 1.90"``."""

    def say(self, text: str) -> None:
        """Print a line of text above the bar."""


@contextmanager
def progress(title: str, total: float | None = None, unit: str = "it", done: float = 0) -> Iterator[Bar]:
    """Progress with rate and time left, on standard error.

    A terminal gets a live bar; anything else gets plain lines, the first after two seconds and then at
    growing intervals, so that short work prints nothing.

    Args:
        title: what is being done, in a few words.
        total: amount of work in ``unit``; None when it is not known.
        unit: what is counted, in the plural: ``"tokens"``, ``"steps"``.
        done: work already done before, for example by a run that is resumed.
    """
    if sys.stderr.isatty():
        with _live(title, total, unit, done) as live:
            yield live
        return
    plain = _PlainBar(title, total, unit, done)
    yield plain
    plain.close()


@contextmanager
def counted(title: str, total: float) -> Iterator[Callable[[float], None]]:
    """Progress of tokens as a function that counts them (see :func:`progress`)."""
    with progress(title, total, "tokens") as bar:
        yield bar.advance


@contextmanager
def _live(title: str, total: float | None, unit: str, done: float) -> Iterator[_LiveBar]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[text]}", style="dim"),
    )
    with Progress(*columns, console=console(stderr=True), expand=True) as display:
        yield _LiveBar(display, title, total, unit, done)


class _Pace:
    """Counts work and time; the rate is the mean since the start of this run."""

    def __init__(self, total: float | None, unit: str, done: float) -> None:
        self.total, self.unit = total, unit
        self.first = self.done = done
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def rate(self) -> float:
        return (self.done - self.first) / max(self.elapsed, 1e-9)

    def left(self) -> float:
        if self.total is None or self.done <= self.first:
            return math.inf
        return max(0.0, self.total - self.done) / self.rate()

    def figures(self) -> str:
        share = f"/{human_count(self.total)}" if self.total else ""
        return f"{human_count(self.done)}{share} {self.unit}, {human_count(self.rate())} {self.unit}/s"


class _PlainBar:
    def __init__(self, title: str, total: float | None, unit: str, done: float) -> None:
        self._title, self._pace, self._text = title, _Pace(total, unit, done), ""
        self._pause = _DELAY
        self._next = self._pace.started + _DELAY
        self._spoke = False

    def advance(self, amount: float = 1) -> None:
        self._pace.done += amount
        now = time.monotonic()
        if now >= self._next:
            self._line(f"{human_time(self._pace.left())} left")
            self._pause = min(self._pause * _GROWTH, _LONGEST_PAUSE)
            self._next = now + self._pause

    def note(self, text: str) -> None:
        self._text = text

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._spoke:
            self._line(f"done in {human_time(self._pace.elapsed)}")

    def _line(self, ending: str) -> None:
        self._spoke = True
        parts = [f"{self._title}: {self._pace.figures()}", self._text, ending]
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


class _LiveBar:
    def __init__(self, display: Any, title: str, total: float | None, unit: str, done: float) -> None:
        self._display, self._pace, self._text = display, _Pace(total, unit, done), ""
        self._task = display.add_task(title, total=total, completed=done, figures="", left="", text="")

    def advance(self, amount: float = 1) -> None:
        self._pace.done += amount
        self._show()

    def note(self, text: str) -> None:
        self._text = text
        self._show()

    def say(self, text: str) -> None:
        self._display.console.print(text, markup=False)

    def _show(self) -> None:
        left = f"{human_time(self._pace.left())} left" if self._pace.total else ""
        self._display.update(
            self._task, completed=self._pace.done, figures=self._pace.figures(), left=left, text=self._text
        )
