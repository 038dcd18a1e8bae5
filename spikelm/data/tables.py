"""Documents in columns: parquet files and Arrow files and streams, read batch by batch through pyarrow."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.data.compressed import is_compressed, open_bytes, plain_suffix
from spikelm.data.files import PARQUET_SUFFIXES, stamp
from spikelm.data.source import Source
from spikelm.errors import DataError, nearest

if TYPE_CHECKING:
    from spikelm.data.compressed import Place

_BATCH_ROWS = 1024
_ARROW_FILE = b"ARROW1"


class Table(Source):
    """A parquet or Arrow file; the document is the column ``field`` of a row, and null is an empty one.

    Args:
        path: the file; one that is compressed as a whole or not on this machine is copied first.
        field: name of the column.
    """

    kind = "parquet or Arrow file"

    def __init__(self, path: Place, field: str) -> None:
        super().__init__(f"{path}#{field}")
        self._path, self._field = path, field

    def _documents(self) -> Iterator[str]:
        row = 0
        with self._local() as local:
            for column in self._columns(local):
                try:
                    yield from column_texts(column)
                except (UnicodeDecodeError, ValueError) as error:
                    raise DataError(
                        f"{self._path} rows {row} to {row + len(column) - 1}: field {self._field!r} is "
                        f"damaged ({one_line(error)}); copy or download the file again"
                    ) from error
                row += len(column)

    def fields(self) -> dict[str, str]:
        """See :class:`Source`."""
        import pyarrow
        import pyarrow.parquet

        with self._local() as local:
            try:
                if plain_suffix(self._path) in PARQUET_SUFFIXES:
                    schema = pyarrow.parquet.read_schema(_existing(local))
                else:
                    with pyarrow.memory_map(str(_existing(local))) as source:
                        schema = _open_arrow(source)[0]
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{self._path} is truncated or corrupted ({one_line(error)})") from error
        return {field.name: str(field.type) for field in schema}

    @contextmanager
    def _local(self) -> Iterator[Path]:
        if isinstance(self._path, Path) and not is_compressed(self._path):
            yield self._path
            return
        with tempfile.NamedTemporaryFile(prefix="spikelm-", suffix=plain_suffix(self._path)) as copy:
            with open_bytes(self._path) as stream:
                shutil.copyfileobj(stream, copy, 1 << 20)
            copy.flush()
            yield Path(copy.name)

    def _columns(self, local: Path) -> Iterator[Any]:
        import pyarrow

        row = 0
        parquet = plain_suffix(self._path) in PARQUET_SUFFIXES
        batches = self._parquet(local) if parquet else self._arrow(local)
        while True:
            try:
                column = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                where = f" after row {row}" if row else ""
                raise DataError(
                    f"{self._path} is truncated or corrupted{where} ({one_line(error)}); "
                    "copy or download it again"
                ) from error
            if column is None:
                return
            yield column
            row += len(column)

    def _parquet(self, local: Path) -> Iterator[Any]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(_existing(local), page_checksum_verification=True) as file:
            check_column(file.schema_arrow, self._field, str(self._path))
            for group in range(file.num_row_groups):  # one by one, so that a damaged one can be named
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self._field]):
                    yield batch.column(batch.schema.get_field_index(self._field))

    def _arrow(self, local: Path) -> Iterator[Any]:
        import pyarrow

        with pyarrow.memory_map(str(_existing(local))) as source:
            schema, batches = _open_arrow(source)
            check_column(schema, self._field, str(self._path))
            for batch in batches:
                column = batch.column(batch.schema.get_field_index(self._field))
                column.validate(full=True)  # offsets of a damaged file would be read outside the file
                yield column

    def fingerprint(self) -> str:
        """That of the file, and the field."""
        return f"table:{self._field}:{stamp(self._path)}"


def _open_arrow(source: Any) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of an Arrow file or stream."""
    import pyarrow

    if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
        file = pyarrow.ipc.open_file(source)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    source.seek(0)
    stream = pyarrow.ipc.open_stream(source)
    return stream.schema, iter(stream)


def check_column(schema: Any, field: str, where: str) -> None:
    """Refuse a column that is missing, there twice or no text.

    Raises:
        DataError: with the names of the columns, or the type of this one.
    """
    if field not in schema.names:
        raise DataError(f"{where}: {nearest('field', field, schema.names)}")
    if schema.get_field_index(field) < 0:
        raise DataError(f"{where} has several columns {field!r}; expected one")
    kind = schema.field(field).type
    if not is_text(kind):
        raise DataError(f"{where}: field {field!r} holds {kind} where text was expected")


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def column_texts(column: Any) -> Iterator[str]:
    """The texts of an Arrow array; null is the empty text."""
    for value in column.to_pylist():
        yield value or ""


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line that is not too long."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words.rstrip(".") if len(words) <= 300 else f"{words[:300]}..."


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no file {path}; give the path of an existing file")
    return path
