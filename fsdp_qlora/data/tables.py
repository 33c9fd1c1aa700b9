"""Rows of Parquet and Arrow files, restored to their form before they were stored in a table.

All rows of a column share one type. An object therefore gets the keys of all other rows, as nulls, and values without a
common type are stored as JSON. Both are undone here. Cells are converted only when they are read: a cell that cannot be
converted makes its row a bad row, and a column that nobody reads cannot fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fsdp_qlora.data.lines import MAX_ROW, TOO_LONG
from fsdp_qlora.data.table_sizes import MAX_BATCH, require_unfoldable, rows_at_once, weight
from fsdp_qlora.errors import DataError, typed_line

if TYPE_CHECKING:
    import pyarrow as pa


Convert = Callable[[Any], Any]


class _Batch:
    """The columns of a record batch as Python objects, each converted on first access."""

    def __init__(self, batch: pa.RecordBatch, too_long: bool = False) -> None:
        self._batch, self._too_long = batch, too_long
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
        except Exception as error:  # depends on the type: dates out of range, invalid UTF-8
            raise DataError(f"the column {column!r} cannot be read: {typed_line(error)}") from error

    def _converted(self, column: str) -> tuple[Any, Convert | None]:
        index = self._batch.schema.get_field_index(column)
        if index < 0:
            raise DataError(f"the column {column!r} appears twice") if column in self.names else KeyError(column)
        cells = self._batch.column(index)
        if self._too_long and weight(cells) > MAX_ROW:
            raise DataError(f"the column {column!r} {TOO_LONG}")
        try:
            return cells.to_pylist(), null_dropper(cells.type)
        except Exception:  # some cell cannot be converted: convert them one by one to find it
            return cells, null_dropper(cells.type)


class TableRow(Mapping[str, Any]):
    """One row of a table; accessing a cell that cannot be converted raises `DataError`."""

    def __init__(self, batch: _Batch, number: int, size: int) -> None:
        self._batch, self._number = batch, number
        self.size = size
        """Approximate size in memory in bytes."""

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


def table_rows(kind: str, name: str, stream: BinaryIO, file: Path | None) -> Iterator[TableRow]:
    """Yield the rows of a Parquet file, an Arrow stream or an Arrow file.

    Args:
        kind: ``parquet`` or ``arrow``.
        name: the file's name in messages.
        stream: its content, decompressed.
        file: the local, uncompressed file, which is memory-mapped instead of read; else None. Used for Arrow.

    Raises:
        DataError: if an Arrow record batch, or an Arrow stream that must be read whole, is larger than `MAX_BATCH`.
    """
    for record_batch in _parquet(stream) if kind == "parquet" else _arrow(name, stream, file):
        for piece, size in _pieces(record_batch):
            batch = _Batch(piece, too_long=size > MAX_ROW)
            for number in range(piece.num_rows):
                yield TableRow(batch, number, size // piece.num_rows)


def _pieces(batch: pa.RecordBatch) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Split a batch into pieces of at most `MAX_ROW` bytes, or one row; yield each with its size."""
    size = sum(map(weight, batch.columns))
    if size <= MAX_ROW or batch.num_rows <= 1:
        if batch.num_rows:
            yield batch, size
        return
    middle = batch.num_rows // 2
    yield from _pieces(batch.slice(0, middle))
    yield from _pieces(batch.slice(middle))


def _parquet(stream: BinaryIO) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).total_byte_size
        yield from file.iter_batches(batch_size=rows_at_once(size), row_groups=[group])


def _arrow(name: str, stream: BinaryIO, file: Path | None) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if file is not None:
        source = pa.memory_map(str(file))
    else:
        data = stream.read(MAX_BATCH + 1)
        if len(data) > MAX_BATCH:
            raise DataError(
                f"data: {name} is larger than the limit of {MAX_BATCH >> 30} GiB for an Arrow file that is remote "
                "or compressed as a whole; download or decompress it."
            )
        source = pa.BufferReader(data)
    start = 8 if source.read(6) == b"ARROW1" else 0  # the file format is a stream between a magic and a footer
    source.seek(start)
    require_unfoldable(name, source)
    source.seek(start)
    yield from pa.ipc.open_stream(source)


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys whose value is null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def null_dropper(kind: pa.DataType, decode: bool = True) -> Convert | None:
    """Return a function that drops null keys from values of a type; None if the type has no keys.

    Nulls inside JSON are kept, because they were written explicitly. With ``decode``, JSON is decoded from text.
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
