"""Labelled lines: read, checked, divided into training, dev and test set.

A line is ``label text`` (one space or tab between them), or a JSON object in a .jsonl file. Where a protocol
has no fixed sets (MR and Subj are published with ten folds), a hash of the text decides, so that the sets
are the same everywhere and equal texts never stand on both sides.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.data.compressed import decode_utf8, plain_suffix, read_bytes
from spikelm.data.files import JSONL_SUFFIXES
from spikelm.errors import DataError, nearest
from spikelm.train.finetune.config import FOLDS

if TYPE_CHECKING:
    from spikelm.train.finetune.config import LabelledConfig

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One labelled text.

    Attributes:
        label: as written in the file.
        text: without the line's end.
        where: file and line, for messages.
    """

    label: str
    text: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learnt.

    Attributes:
        labels: names of the classes.
        train, dev, test: the sets; ``test`` may be empty.
        protocol: how the sets came about, in one sentence.
    """

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    protocol: str

    def counts(self) -> dict[str, dict[str, int]]:
        """Set -> class -> texts."""
        return {
            name: {label: found[index] for index, label in enumerate(self.labels)}
            for name, found in (
                (part, Counter(example.label for example in getattr(self, part)))
                for part in ("train", "dev", "test")
            )
        }

    def fingerprint(self) -> str:
        """Changes when a text, a label or a set does."""
        digest = hashlib.sha256()
        for part in (self.train, self.dev, self.test):
            for example in part:
                digest.update(f"{example.label} {example.text}\n".encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
        return digest.hexdigest()


def load_task(config: LabelledConfig, warn: Callable[[str], None]) -> Task:
    """Read and divide the files of a configuration.

    Args:
        config: what to read.
        warn: told what is odd but usable.

    Raises:
        DataError: a file or line cannot be used, there is one class only, a class has no training text, or a
            label of another set is unknown.
    """

    def read(path: str) -> list[Line]:
        return read_labelled(expand(path), config.text_field, config.label_field, config.encoding)

    lines = read(config.train)
    said = []
    if config.test is not None:
        test = read(config.test)
        said.append("test set as given")
    elif config.fold is not None:
        fold = config.fold
        test = [line for line in lines if bucket("fold", line.text, FOLDS) == fold]
        lines = [line for line in lines if bucket("fold", line.text, FOLDS) != fold]
        said.append(f"test set: fold {fold} of {FOLDS} by a hash of the text (about {len(test)} lines)")
    else:
        test = []
        said.append("no test set")
    if config.dev is not None:
        dev = read(config.dev)
        said.append("dev set as given")
    else:
        held = {line.text for line in lines if _share(line.text) < config.dev_share}
        dev = [line for line in lines if line.text in held]
        lines = [line for line in lines if line.text not in held]
        said.append(f"dev set: {config.dev_share:.0%} of the training lines by a hash of the text")
    names = _class_names(config, lines)
    sets: dict[str, tuple[Example, ...]] = {}
    for part, found in (("train", lines), ("dev", dev), ("test", test)):
        sets[part] = tuple(_examples(found, names))
        if not found and not (part == "test" and config.test is None and config.fold is None):
            raise DataError(
                f"the {part} set is empty; give more lines, a file of its own (data.{part}), or another "
                "data.fold or data.dev_share"
            )
    task = Task(labels=tuple(names.values()), protocol="; ".join(said), **sets)
    for part, counts in task.counts().items():
        lacking = [label for label, count in counts.items() if count == 0]
        if lacking and getattr(task, part):
            warn(f"the {part} set has no text of class {lacking[0]!r}; its figures say nothing about it")
    return task


def read_labelled(
    path: Path, text_field: str = "text", label_field: str = "label", encoding: str = "utf-8"
) -> list[Line]:
    """The lines of a file; empty ones are passed over.

    Raises:
        DataError: the file cannot be read, or a line has no label or no text.
    """
    is_json = plain_suffix(path) in JSONL_SUFFIXES
    text = _decode(read_bytes(path), path, "utf-8" if is_json else encoding)
    rows = ((f"{path} line {number}", row) for number, row in enumerate(text.split("\n"), 1) if row.strip())
    if is_json:
        lines = [_json_line(where, row, text_field, label_field) for where, row in rows]
    else:
        lines = [_plain_line(where, row) for where, row in rows]
    if not lines:
        raise DataError(f"{path} holds no line; expected lines of the form: label text")
    return lines


def _decode(data: bytes, path: Path, encoding: str) -> str:
    if encoding != "utf-8":
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not {encoding} at byte {error.start}; set data.encoding") from error
    try:
        return decode_utf8(data, str(path)).removeprefix("\ufeff")
    except DataError as error:
        raise DataError(f"{error}, or name its encoding: data.encoding=latin-1") from error


def expand(path: str) -> Path:
    """A path with its ``$NAME`` environment variables filled in.

    Raises:
        DataError: a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise DataError(
                f"{path}: the environment variable {name} is not set; set it to the folder that holds the "
                "data, or give the path: data.train=FILE"
            )
        return os.environ[name]

    return Path(_VARIABLE.sub(value, path))


def bucket(key: str, text: str, buckets: int) -> int:
    """Which of several equal parts a text falls into: a hash of key and text, the same everywhere."""
    return _hash(key, text) % buckets


def _share(text: str) -> float:
    return _hash("dev", text) / 2.0**64


def _hash(key: str, text: str) -> int:
    digest = hashlib.sha256(f"{key}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def _plain_line(where: str, row: str) -> Line:
    """``label text``; what stands before the first space or tab is the label."""
    label, *rest = row.strip("\r").strip().split(maxsplit=1)
    if not rest:
        raise DataError(f"{where} is {row.strip()[:40]!r}, one word; expected a label, a space and the text")
    return Line(label=label, text=rest[0].strip(), where=where)


def _json_line(where: str, row: str, text_field: str, label_field: str) -> Line:
    try:
        values = json.loads(row)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); expected one object a line") from error
    if not isinstance(values, Mapping):
        raise DataError(f"{where} is a JSON {type(values).__name__}; expected an object")
    for key, field in (("text_field", text_field), ("label_field", label_field)):
        if field not in values:
            known = nearest("field", field, map(str, values))
            raise DataError(f"{where}: {known}; data.{key} names it")
    label: Any = values[label_field]
    text: Any = values[text_field]
    if isinstance(label, float) or not isinstance(label, (str, int)) or label == "":
        raise DataError(f"{where}: the label is {label!r}; expected text or a whole number")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the text is {text!r}; expected text that is not empty")
    return Line(label=str(label), text=text.strip(), where=where)


def _class_names(config: LabelledConfig, lines: Sequence[Line]) -> dict[str, str]:
    """Label in the file -> name of the class, in the order of the scores.

    Raises:
        DataError: one class only, or a class of the configuration has no training text.
    """
    found = Counter(line.label for line in lines)
    if config.labels is not None:
        names = dict(config.labels)
        lacking = [label for label in names if not found[label]]
        if lacking:
            raise DataError(
                f"{config.train} has no training text of class {lacking[0]!r} of data.labels; "
                f"it has {', '.join(sorted(found))}"
            )
    else:
        whole = all(re.fullmatch(r"[+-]?\d+", label) for label in found)
        ordered = sorted(found, key=int) if whole else sorted(found)
        names = {label: label for label in ordered}
    if len(names) < 2:
        raise DataError(
            f"{config.train} has one class only ({next(iter(names), 'none')!r}); a classifier needs two"
        )
    if len(set(names.values())) < len(names):
        raise DataError(f"data.labels gives two labels the same name: {sorted(names.values())}")
    return names


def _examples(lines: Iterable[Line], names: Mapping[str, str]) -> Iterator[Example]:
    numbers = {label: index for index, label in enumerate(names)}
    for line in lines:
        if line.label not in numbers:
            raise DataError(
                f"{line.where}: {nearest('label', line.label, numbers)} (from the training lines)"
            )
        yield Example(text=line.text, label=numbers[line.label])
