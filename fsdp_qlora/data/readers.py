"""Reads a file of any size row by row, with each row's place in the file.

Text is read line by line here rather than by `datasets`, whose readers infer one schema for a whole file and do not
report line numbers: a row with a different shape must not fail its neighbours, and a bad row must be easy to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from fsdp_qlora.data.csv_rows import csv_rows
from fsdp_qlora.data.json_rows import json_lines, json_rows
from fsdp_qlora.data.lines import Row, text_lines
from fsdp_qlora.data.remote import opened, path_of, seekable
from fsdp_qlora.data.tables import table_rows
from fsdp_qlora.errors import DataError, typed_line
from fsdp_qlora.shown import shown_source

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name, or None if it is unknown."""
    path = Path(path_of(name))
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return KINDS.get(suffix)


def read_file(name: str) -> Iterator[Row]:
    """Yield the rows of a file or URL; a bad row has a problem instead of values.

    Raises:
        DataError: if the file cannot be read, or not beyond some point.
    """
    try:
        yield from _rows(name)
    except DataError:
        raise
    except Exception as error:  # each format and compression has its own exceptions
        raise DataError(f"data: {shown_source(name)} cannot be read: {typed_line(error)}") from error


def _rows(source: str) -> Iterator[Row]:
    kind, name = kind_of(source), shown_source(source)
    if kind is None:
        raise DataError(f"data: {name}: unknown file type; known types are {', '.join(KINDS)}.")
    if "://" not in name:
        _require_content(Path(name))
    if kind == "json":
        yield from json_rows(name, partial(opened, source))
        return
    with opened(source) as stream:
        if kind in ("parquet", "arrow"):
            file = None if "://" in name or name.endswith(COMPRESSED) else Path(name)
            with seekable(stream) as table:
                for number, values in enumerate(table_rows(kind, name, table, file), start=1):
                    yield Row(f"{name}, row {number}", values, size=values.size)
        elif kind == "csv":
            yield from csv_rows(name, stream)
        elif kind == "text":
            for row in text_lines(name, stream):
                yield row if row.values is None else replace(row, values={"text": row.values["line"]})
        else:
            yield from json_lines(name, stream)


def _require_content(file: Path) -> None:
    """Reject Git LFS pointers and files in UTF-16."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise DataError(f"data: {file} is a Git LFS pointer, not the file itself; `git lfs pull` fetches the file.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"data: {file} is UTF-16 text; save it as UTF-8.")
