"""Data sets of the Hugging Face Hub, and folders in their layout, through the ``datasets`` library.

``hub:OWNER/NAME[:CONFIG][@REVISION][?stream][#SPLIT[.FIELD]]``: the split is ``train`` and the field ``text``
unless named; a split may be a slice as that library writes them, ``train[:10%]``. In place of OWNER/NAME
stands the path of a local folder as well. With ``?stream`` nothing is copied to this machine first. Code that
a data set brings along is never run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from spikelm.data.files import files_below, stamp
from spikelm.data.source import Source
from spikelm.data.tables import column_texts, is_text, one_line
from spikelm.errors import DataError, nearest

PREFIX = "hub:"
SYNTAX = "hub:OWNER/NAME[:CONFIG][@REVISION][?stream][#SPLIT[.FIELD]]"
_SPEC = re.compile(
    r"(?P<name>[^:@?#]+)(:(?P<config>[^@?#]+))?(@(?P<revision>[^?#]+))?(?P<stream>\?stream)?"
    r"(#(?P<split>[^.\[\]]+(\[[^\]]*\])?)(\.(?P<field>.+))?)?"
)
_ROWS = 1024
_T = TypeVar("_T")


class HubData(Source):
    """One text field of one split.

    Args:
        spec: what follows ``hub:``.

    Raises:
        DataError: it is not of the form above.
    """

    kind = "data set of the Hub"

    def __init__(self, spec: str) -> None:
        super().__init__(PREFIX + spec)
        found = _SPEC.fullmatch(spec)
        if found is None:
            raise DataError(f"{self.name} is no data set of the Hub; expected {SYNTAX}")
        self._path, self._config, self._revision = found["name"], found["config"], found["revision"]
        self._stream = found["stream"] is not None
        self._split, self._field = found["split"] or "train", found["field"] or "text"

    def _documents(self) -> Iterator[str]:
        import datasets

        options = self._options() | ({"streaming": True} if self._stream else {})
        data = self._asked(lambda: datasets.load_dataset(split=self._split, **options))
        read = streamed_texts if self._stream else texts
        rows = read(data, self._field, self.name)
        while True:
            text = self._asked(lambda: next(rows, None))
            if text is None:
                return
            yield text

    def fingerprint(self) -> str:
        """The library's hash of the files (their revision on the Hub, or size and time of local ones)."""
        import datasets

        builder = self._asked(lambda: datasets.load_dataset_builder(**self._options()))
        parts = (self._path, builder.config_id, builder.hash, self._revision, self._split, self._field)
        return "hub:" + ":".join(map(str, parts))

    def fields(self) -> dict[str, str]:
        """See :class:`Source`; read from the first row of the stream where the data set does not tell."""
        import datasets

        options = self._options() | {"streaming": True}
        data = self._asked(lambda: datasets.load_dataset(split=self._split.partition("[")[0], **options))
        if data.features is not None:
            return {str(name): _type(feature) for name, feature in data.features.items()}
        row: dict[str, Any] = self._asked(lambda: next(iter(data), {}))
        return {str(name): type(value).__name__ for name, value in row.items()}

    def _options(self) -> dict[str, Any]:
        import datasets

        options: dict[str, Any] = {"path": self._path, "name": self._config}
        if self._revision is not None:
            options["revision"] = self._revision
        # Before 4.0 the library could run a data set's own code, and asked on the terminal whether to.
        if "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters:
            options["trust_remote_code"] = False
        return options

    def _asked(self, ask: Callable[[], _T]) -> _T:
        """What ``ask`` returns; whatever the library raises becomes one sentence."""
        import datasets

        try:
            return ask()
        except DataError:
            raise
        except datasets.exceptions.DatasetNotFoundError as error:
            raise DataError(
                f"{self.name}: there is no such data set on the Hub, or it needs a login ({one_line(error)})"
            ) from error
        except (ConnectionError, TimeoutError) as error:
            raise DataError(
                f"{self.name}: the Hub cannot be reached ({one_line(error)}); connect to the network, or "
                "name a local copy"
            ) from error
        except Exception as error:  # the readers of many formats and file systems lie behind it
            raise DataError(f"{self.name} {self._describe(error)}") from error

    def _describe(self, error: Exception) -> str:
        import datasets

        message = str(error)
        if re.search(r"BuilderConfig '.*' not found|Config name is missing", message):
            known = re.findall(r"'([^']*)'", message.partition("[")[2].partition("]")[0])
            if self._config is None:
                return f"has several configurations; choose one of {', '.join(known)} ({SYNTAX})"
            return f"{nearest('configuration', self._config, known)}"
        if re.match(r"Unknown split|Bad split", message):
            known = re.findall(r"'([^']*)'", message.partition("[")[2])
            name = self._split.partition("[")[0]
            if name in known:
                return "names a slice, which a stream has not; leave ?stream or the slice out"
            return nearest("split", name, known)
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return f"cannot be read: {one_line(error)}"


class SavedData(Source):
    """A data set written by the library's ``save_to_disk``.

    Args:
        path: its folder.
        name: the specification.
        split: which, or None where the folder holds no splits.
        field: name of the text column.
    """

    kind = "saved data set"

    def __init__(self, path: Path, name: str, split: str | None, field: str) -> None:
        super().__init__(name)
        self._path, self._split, self._field = path, split, field

    def _documents(self) -> Iterator[str]:
        data = self._load()
        try:
            yield from texts(data, self._field, self.name)
        except DataError:
            raise
        except Exception as error:  # see HubData
            raise DataError(f"{self.name} cannot be read: {one_line(error)}") from error

    def fields(self) -> dict[str, str]:
        """See :class:`Source`."""
        return {str(name): _type(feature) for name, feature in self._load().features.items()}

    @property
    def _folder(self) -> Path:
        return self._path / self._split if self._split is not None else self._path

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_from_disk(str(self._folder))
        except Exception as error:  # see HubData
            raise DataError(f"{self.name} cannot be read: {one_line(error)}") from error

    def fingerprint(self) -> str:
        """Sizes and times of its files, and the field."""
        stamps = [stamp(path) for path in files_below(self._folder, {".arrow", ".json"})]
        return f"saved:{self._field}:{'|'.join(stamps)}"


def saved_data(path: Path, name: str, fragment: str) -> SavedData | None:
    """The data set saved in a folder; None where there is none.

    Args:
        path: the folder.
        name: the specification.
        fragment: FIELD, or SPLIT[.FIELD] where the folder holds splits.

    Raises:
        DataError: there is no such split.
    """
    if (path / "dataset_dict.json").is_file():
        split, _, field = fragment.partition(".")
        split = split or "train"
        known = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        if split not in known:
            raise DataError(f"{name}: {nearest('split', split, known)}")
        return SavedData(path, name, split, field or "text")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return SavedData(path, name, None, fragment or "text")
    return None


def texts(data: Any, field: str, name: str) -> Iterator[str]:
    """The field of every row of a data set on this machine; null is the empty text.

    Raises:
        DataError: there is no such field, or it holds no text.
    """
    if field not in data.column_names:
        raise DataError(f"{name}: {nearest('field', field, data.column_names)}")
    kind = data.features[field]
    if not is_text(
        kind.pa_type if hasattr(kind, "pa_type") else data.features.arrow_schema.field(field).type
    ):
        raise DataError(f"{name}: field {field!r} holds {kind!r} where text was expected")
    for batch in data.select_columns([field]).with_format("arrow").iter(batch_size=_ROWS):
        for chunk in batch.column(field).chunks:
            yield from column_texts(chunk)


def streamed_texts(data: Any, field: str, name: str) -> Iterator[str]:
    """Like :func:`texts` for a stream, whose fields may be known only when they come."""
    for number, row in enumerate(data):
        if field not in row:
            raise DataError(f"{name}, row {number}: {nearest('field', field, row)}")
        text = row[field]
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"{name}, row {number}: field {field!r} holds a {kind} where text was expected")
        yield text or ""


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)
