"""Rows of Parquet and Arrow files, as they were before they became a table.

All rows of a column share one type. An object therefore gets the keys of all other rows, as nulls, and values without a
common type are stored as JSON. Both are undone here. Cells are converted one by one, when they are read: a cell that
cannot be converted makes its row a bad row, and a column that nobody reads cannot fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fsdp_qlora.errors import DataError, typed_line

if TYPE_CHECKING:
    import pyarrow as pa


Convert = Callable[[Any], Any]


class _Batch:
    """The columns of a record batch as Python objects, each converted when it is first asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self.names = batch.schema.names
        self._columns: dict[str, tuple[Any, Convert | None]] = {}

    def cell(self, column: str, number: int) -> Any:
        """Return a cell.

        Raises:
            KeyError: if there is no such column.
            DataError: if the cell cannot be converted.
        """
        if column not in self._columns:
            self._columns[column] = self._converted(column)
        cells, convert = self._columns[column]
        try:
            value = cells[number] if isinstance(cells, list) else cells[number].as_py()
            return value if convert is None or value is None else convert(value)
        except Exception as error:  # depends on the type: dates out of range, text that is not UTF-8
            raise DataError(f"the column {column!r} cannot be read: {typed_line(error)}") from error

    def _converted(self, column: str) -> tuple[Any, Convert | None]:
        index = self._batch.schema.get_field_index(column)
        if index < 0:
            raise DataError(f"the column {column!r} comes twice") if column in self.names else KeyError(column)
        cells = self._batch.column(index)
        try:
            return cells.to_pylist(), null_dropper(cells.type)
        except Exception:  # some cell cannot be converted: find out which, one by one
            return cells, null_dropper(cells.type)


class TableRow(Mapping[str, Any]):
    """One row of a table; raises DataError for a cell that cannot be converted."""

    def __init__(self, batch: _Batch, number: int) -> None:
        self._batch, self._number = batch, number

    def __getitem__(self, column: str) -> Any:
        return self._batch.cell(column, self._number)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a cell, or ``default`` if there is no such column."""
        return self._batch.cell(key, self._number) if key in self._batch.names else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.names)

    def __len__(self) -> int:
        return len(self._batch.names)

    def __contains__(self, column: object) -> bool:
        return column in self._batch.names

    def __repr__(self) -> str:
        return f"TableRow({', '.join(self)})"


def table_rows(kind: str, stream: Any) -> Iterator[TableRow]:
    """Yield the rows of a Parquet file, an Arrow stream or an Arrow file."""
    for record_batch in _batches(kind, stream):
        batch = _Batch(record_batch)
        for number in range(record_batch.num_rows):
            yield TableRow(batch, number)


def _batches(kind: str, stream: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        yield from pq.ParquetFile(stream).iter_batches(batch_size=1024)
        return
    data = pa.BufferReader(stream.read())
    try:
        batches = iter(pa.ipc.open_stream(data))
    except pa.ArrowInvalid:
        data.seek(0)
        file = pa.ipc.open_file(data)
        batches = (file.get_batch(number) for number in range(file.num_record_batches))
    yield from batches


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys whose value is null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def null_dropper(kind: pa.DataType, decode: bool = True) -> Convert | None:
    """Return a function that drops null keys from values of a type; None if it has none.

    Nulls inside JSON are kept: they were written. With ``decode``, JSON is still text and is decoded.
    """
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.json":
            return json.loads if decode else None
        return null_dropper(kind.storage_type, decode)
    if pa.types.is_struct(kind):
        return _struct_dropper([(field.name, null_dropper(field.type, decode)) for field in kind])
    if pa.types.is_map(kind):  # a list of pairs
        item = null_dropper(kind.item_type, decode)
        return lambda pairs: {key: item(v) if item else v for key, v in pairs if v is not None}
    if isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType | pa.ListViewType | pa.LargeListViewType):
        convert = null_dropper(kind.value_type, decode)
        return None if convert is None else lambda items: [None if v is None else convert(v) for v in items]
    return None


def _struct_dropper(fields: list[tuple[str, Convert | None]]) -> Convert:
    def convert(value: Mapping[str, Any]) -> dict[str, Any]:
        return {name: item(v) if item else v for name, item in fields if (v := value[name]) is not None}

    return convert
