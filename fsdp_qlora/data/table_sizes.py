"""Estimates the expanded size of tables before memory is allocated for it.

A small file can expand to values of any size: compressed buffers, a dictionary whose one long entry is referenced by
every row, or lists of nulls, which take no bytes at all.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from fsdp_qlora.data.lines import MAX_ROW
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_BATCH = 2**31
"""Limit on the decompressed size of a record batch in bytes; a column of text cannot exceed it in Arrow."""
_POINTER = 8
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # `MessageHeader` of Arrow's Message.fbs


def weight(array: Any) -> int:  # noqa: PLR0911  (a line for each kind of column)
    """Estimate the bytes of an array's values as Python objects; a shared value counts once per reference."""
    import pyarrow as pa

    kind, size = array.type, _POINTER * len(array)
    if isinstance(array, pa.ExtensionArray):
        return weight(array.storage)
    if pa.types.is_dictionary(kind):
        return size + _of_dictionary(array)
    if pa.types.is_run_end_encoded(kind):
        return size + len(array) * weight(array.values)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return size + _of_views(array)
    if _is_text(kind) or pa.types.is_fixed_size_binary(kind):
        return size + (_lengths(array).sum().as_py() or 0)
    if pa.types.is_struct(kind):
        return size + sum(map(weight, array.flatten()))
    if pa.types.is_map(kind):
        start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return size + sum(weight(part.slice(start, stop - start)) for part in (array.keys, array.items))
    if isinstance(kind, pa.ListViewType | pa.LargeListViewType):  # views may overlap: flattening would expand them
        return size + sum(weight(item.values) for item in array if item.is_valid)
    if isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return size + weight(array.flatten())
    return size


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)


def _of_dictionary(array: pa.DictionaryArray) -> int:
    import pyarrow as pa

    kind = array.dictionary.type
    if pa.types.is_primitive(kind):
        return 0
    if not _is_text(kind):
        return len(array) * weight(array.dictionary)  # an overestimate, so that fewer rows are converted at once
    return _lengths(array.dictionary).take(array.indices).sum().as_py() or 0


def _lengths(texts: pa.Array) -> Any:
    from pyarrow.compute import call_function

    return call_function("binary_length", [texts])


def _of_views(array: Any) -> int:
    """Return the bytes of an array of views: a view has 16 bytes, and the first four are the length."""
    views = np.frombuffer(array.buffers()[1] or b"", dtype=np.int32).reshape(-1, 4)
    lengths = views[array.offset : array.offset + len(array), 0]
    return int(lengths[np.asarray(array.is_valid())].sum(dtype=np.int64))


def require_unfoldable(name: str, source: pa.NativeFile) -> None:
    """Check the decompressed sizes of an Arrow stream's batches against `MAX_BATCH` without decompressing them.

    Reads the headers and the length prefix of each compressed buffer; uncompressed batches are no larger than in the
    file, and pass. ``source`` is read from its current position.

    Raises:
        DataError: if a batch, or all dictionaries together, would be larger, naming the batch.
    """
    number, dictionaries = 0, 0
    while (message := _next_message(source)) is not None:
        header, length, start = message
        kind, sizes = _sizes(header, source, start)
        total = sum(sizes)
        if kind == _DICTIONARY_BATCH:
            dictionaries += total
        number += kind == _RECORD_BATCH
        if max(total, dictionaries) > MAX_BATCH:
            raise DataError(
                f"data: {name}: record batch {number} takes {max(total, dictionaries) / 2**30:.1f} GiB in memory, but "
                f"at most {MAX_BATCH >> 30} are read at once; write the file in smaller batches."
            )
        source.seek(start + length)


def _next_message(source: pa.NativeFile) -> tuple[bytes, int, int] | None:
    """Return a message's header and the length and position of its body; None at the end."""
    size = source.read(4)
    if size == b"\xff\xff\xff\xff":
        size = source.read(4)
    if len(size) < 4 or size == b"\0\0\0\0":
        return None
    header = source.read(struct.unpack("<I", size)[0])
    at = _field(header, _root(header), 3)
    length = struct.unpack_from("<q", header, at)[0] if at else 0
    if length < 0:
        raise ValueError("a message has a negative length")
    return header, length, source.tell()


def _sizes(header: bytes, source: pa.NativeFile, start: int) -> tuple[int, list[int]]:
    """Return the kind of a message and the decompressed sizes of its buffers; none if they are not compressed."""
    root = _root(header)
    at = _field(header, root, 1)
    kind = header[at] if at else 0
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return kind, []
    batch = _follow(header, _field(header, root, 2))
    if kind == _DICTIONARY_BATCH:
        batch = _follow(header, _field(header, batch, 1))
    vector = _field(header, batch, 2)
    if not (vector and _field(header, batch, 3)):  # no buffers, or not compressed: no larger than in the file
        return kind, []
    vector = _follow(header, vector)
    sizes = []
    for number in range(struct.unpack_from("<I", header, vector)[0]):
        offset, length = struct.unpack_from("<qq", header, vector + 4 + 16 * number)
        if length >= 8:
            source.seek(start + offset)
            sizes.append(max(length, struct.unpack("<q", source.read(8))[0]))  # -1: stored uncompressed
    return kind, sizes


def _root(header: bytes) -> int:
    return struct.unpack_from("<I", header)[0]


def _follow(header: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", header, at)[0]


def _field(header: bytes, table: int, number: int) -> int:
    """Return the position of a field in a FlatBuffers table; 0 if the field is absent."""
    about = table - struct.unpack_from("<i", header, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", header, about)[0]:
        return 0
    offset = struct.unpack_from("<H", header, about + 4 + 2 * number)[0]
    return table + offset if offset else 0


def rows_at_once(group_bytes: int, most: int = 1024) -> int:
    """Return how many rows of a Parquet row group to decode at once; each may contain the whole of a dictionary."""
    return max(1, min(most, 4 * MAX_ROW // max(1, group_bytes)))
