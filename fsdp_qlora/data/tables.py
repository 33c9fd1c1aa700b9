"""Rows of Parquet and Arrow files, as they were before they became a table.

All rows of a column share one type. An object therefore gets the keys of all other rows, as nulls, and values without a
common type are stored as JSON. Both are undone here. Cells are converted one by one, when they are read: a cell that
cannot be converted makes its row a bad row, and a column that nobody reads cannot fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class TableRow(Mapping[str, Any]):
    """One row of a record batch; raises DataError for a cell that cannot be converted."""

    def __init__(self, batch: pa.RecordBatch, number: int) -> None:
        self._batch, self._number = batch, number

    def __getitem__(self, column: str) -> Any:
        index = self._batch.schema.get_field_index(column)
        if index < 0:
            if column in self._batch.schema.names:
                raise DataError(f"the column {column!r} comes twice")
            raise KeyError(column)
        try:
            cell = self._batch.column(index)[self._number]
            return without_nulls(cell.as_py(), cell.type)
        except Exception as error:  # depends on the type: dates out of range, text that is not UTF-8
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(f"the column {column!r} cannot be read: {type(error).__name__}: {reason}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return self._batch.num_columns

    def __contains__(self, column: object) -> bool:
        return column in self._batch.schema.names

    def __repr__(self) -> str:
        return f"TableRow({', '.join(self)})"


def table_rows(kind: str, stream: Any) -> Iterator[TableRow]:
    """Yield the rows of a Parquet file, an Arrow stream or an Arrow file."""
    for batch in _batches(kind, stream):
        for number in range(batch.num_rows):
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


def without_nulls(value: Any, kind: pa.DataType | None = None) -> Any:
    """Return ``value`` without keys whose value is null, and with text of the type JSON decoded.

    Args:
        value: what a cell holds, as Python objects.
        kind: its Arrow type, which tells JSON from text and a map from a list of pairs; None goes by the value alone.
    """
    if value is None:
        return None
    if kind is not None:
        return _typed(value, kind)
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _typed(value: Any, kind: pa.DataType) -> Any:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        is_json = kind.extension_name == "arrow.json" and isinstance(value, str)
        value = json.loads(value) if is_json else without_nulls(value, kind.storage_type)
    elif pa.types.is_struct(kind):
        value = {f.name: without_nulls(value[f.name], f.type) for f in kind if value[f.name] is not None}
    elif pa.types.is_map(kind):
        value = {key: without_nulls(item, kind.item_type) for key, item in value if item is not None}
    elif isinstance(value, list):
        value = [without_nulls(item, kind.value_type) for item in value]
    return value
