"""The log of a run: one JSON object per line, one line per logged step however often the run was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from spikelm.errors import TrainingError
from spikelm.train.files import replace_text, why


class Follower(Protocol):
    """Is told what the log is told (:class:`spikelm.train.trackers.Trackers`)."""

    def rewind(self, step: int) -> None:
        """The log goes on after ``step``; what came later is no longer true."""

    def tell(self, event: str, values: Mapping[str, Any]) -> None:
        """A line was written."""


class RunLog:
    """``log.jsonl`` of a run.

    Args:
        path: the file; it is created with its first line.
        silent: write nothing (every rank but the first).
        follower: told what is written and where the log goes back.
    """

    def __init__(self, path: Path, silent: bool = False, follower: Follower | None = None) -> None:
        self.path, self.silent, self._follower = path, silent, follower

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Append a line ``{"event": event, ...}``; numbers that are not finite become strings.

        Raises:
            TrainingError: the file cannot be written.
        """
        if self.silent:
            return
        line = json.dumps({"event": event, **_plain(values)}, ensure_ascii=False, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise self._unwritable(error) from error
        if self._follower is not None:
            self._follower.tell(event, values)

    def start(self) -> None:
        """Begin a new log; an older one (of a run that ended before its first checkpoint) is replaced.

        Raises:
            TrainingError: the file cannot be written.
        """
        if self.silent:
            return
        try:
            replace_text(self.path, "")
        except OSError as error:
            raise self._unwritable(error) from error
        if self._follower is not None:
            self._follower.rewind(0)

    def rewind(self, step: int) -> None:
        """Drop what lies after ``step``, and a line cut in half: resume writes those steps again.

        Raises:
            TrainingError: the file cannot be read or written.
        """
        if self.silent:
            return
        if self.path.exists():
            kept = [line for line, values in self._lines() if values.get("step", 0) <= step]
            try:
                replace_text(self.path, "".join(line + "\n" for line in kept))
            except OSError as error:
                raise self._unwritable(error) from error
        if self._follower is not None:
            self._follower.rewind(step)

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"the log {self.path} cannot be written ({why(error)}); the checkpoints are whole: make room or "
            "mend the permissions, then the same command continues the run"
        )

    def read(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines, or those of one event."""
        return [values for _, values in self._lines() if event is None or values["event"] == event]

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise TrainingError(f"the log {self.path} cannot be read ({why(error)})") from error
        found = []
        for line in text.split("\n"):
            try:
                values = json.loads(line)
            except ValueError:
                continue  # the line a kill cut in half, or the end of the file
            if isinstance(values, dict) and "event" in values:
                found.append((line, values))
        return found


def _plain(value: Any) -> Any:
    """JSON values; NaN and infinities as text, because JSON has no word for them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value
