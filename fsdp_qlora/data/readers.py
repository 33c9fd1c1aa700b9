"""One file -> its rows, each with its place in the file.

Text is read line by line here and not by `datasets`, whose readers infer one schema for a whole file and name no
line: a row of another shape must not fail its neighbours, and a bad one must be found.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fsdp_qlora.data.tables import table_rows
from fsdp_qlora.errors import DataError, first_line, typed_line

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True)
class Row:
    """One row, or why there is none."""

    where: str
    """File and line, or file and row number."""
    values: Mapping[str, Any] | None
    problem: str = ""
    """What is wrong with it, where ``values`` is None."""


def kind_of(name: str) -> str | None:
    """Return the kind of a file with that name, None if it is unknown."""
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return KINDS.get(suffix)


def read_file(name: str) -> Iterator[Row]:
    """Yield the rows of a file or URL; a bad row has its problem instead of values.

    Raises:
        DataError: if the file cannot be read at all, or no further.
    """
    try:
        yield from _rows(name)
    except DataError:
        raise
    except Exception as error:  # every format and every compression has errors of its own
        raise DataError(f"data: {name} cannot be read: {typed_line(error)}") from error


def _rows(name: str) -> Iterator[Row]:
    import fsspec

    kind = kind_of(name)
    if kind is None:
        raise DataError(f"data: {name}: unknown kind of file; known are {', '.join(KINDS)}.")
    if "://" not in name:
        _require_content(Path(name))
    with cast(Any, fsspec.open(name, "rb", compression="infer")) as opened:
        stream = io.BufferedReader(opened) if name.endswith(".zst") else opened  # zstd's own has no lines
        if kind in ("parquet", "arrow"):
            for number, values in enumerate(table_rows(kind, stream), start=1):
                yield Row(f"{name}, row {number}", values)
        elif kind == "csv":
            yield from _csv(name, stream)
        elif kind == "text":
            for row in _lines(name, stream):
                yield row if row.values is None else Row(row.where, {"text": row.values["line"]})
        else:
            yield from _json(name, kind, stream)


def _require_content(file: Path) -> None:
    """Refuse pointers of Git LFS and files in UTF-16."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise DataError(
            f"data: {file} is not the file itself but a pointer of Git LFS; `git lfs pull` fetches the file."
        )
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"data: {file} is text in UTF-16; save it as UTF-8.")


def _lines(name: str, stream: Any) -> Iterator[Row]:
    """Yield lines that are not blank as ``{"line": text}``; what is not UTF-8 as a problem."""
    for number, line in enumerate(stream, start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Row(where, None, f"not valid UTF-8 at byte {error.start + 1} of the line")
            continue
        if "\0" in text:
            yield Row(where, None, "holds a NUL character")
        elif text.strip():
            yield Row(where, {"line": text})


def _json(name: str, kind: str, stream: Any) -> Iterator[Row]:
    if kind == "json":
        data = stream.read()
        if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _json_array(name, data.decode("utf-8-sig", "surrogateescape"))
            return
        if (row := _one_object(name, data)) is not None:
            yield row
            return
        stream = io.BytesIO(data)
    parse = _Parser()
    for row in _lines(name, stream):
        if row.values is None:
            yield row
            continue
        try:
            yield parse.row(row.where, row.values["line"].strip(), 0)[0]
        except json.JSONDecodeError as error:
            yield Row(row.where, None, f"not valid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            yield Row(row.where, None, "not valid JSON: nested too deeply")


def _one_object(name: str, data: bytes) -> Row | None:
    """Return the row of a file that is a single object over several lines; None for any other file."""
    text = data.decode("utf-8-sig", "surrogateescape").strip()
    try:
        return _Parser().row(f"{name}, row 1", text, 0)[0] if "\n" in text else None
    except (ValueError, RecursionError):
        return None


def _json_array(name: str, text: str) -> Iterator[Row]:
    """Yield the rows of an array. Bytes that are not UTF-8 become surrogates, which are refused when they are learned.

    Raises:
        DataError: if the syntax is broken: rows after that point cannot be found.
    """
    parse, number = _Parser(), 1
    at = _skip(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        try:
            row, at = parse.row(f"{name}, row {number}", text, at, whole=False)
            at = _skip(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except (ValueError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
            raise DataError(
                f"data: {name}, row {number} is not valid JSON, so no later row can be read: {said}"
            ) from error
        yield row
        if text[at] == "]":
            return
        at, number = _skip(text, at + 1), number + 1


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


class _Parser:
    """Parses objects and notices duplicate keys, of which Python silently keeps the last."""

    def __init__(self) -> None:
        self._twice: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            self._twice = next(key for key, _ in pairs if sum(1 for other, _ in pairs if other == key) > 1)
        return values

    def row(self, where: str, text: str, start: int, whole: bool = True) -> tuple[Row, int]:
        """Return the row whose JSON starts at ``start``, and where it ends.

        Raises:
            json.JSONDecodeError: if there is no JSON, or something follows it and it should be the ``whole`` text.
        """
        self._twice = None
        value, end = self._decoder.raw_decode(text, start)
        if whole and end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        if self._twice is not None:
            return Row(where, None, f"the key {self._twice!r} comes twice"), end
        if not isinstance(value, dict):
            return Row(where, None, f"expected an object {{...}}, got {type(value).__name__}"), end
        return Row(where, value), end


def _noted(lines: Iterable[str], notes: list[str]) -> Iterator[str]:
    """Yield the lines and append each to ``notes``."""
    for line in lines:
        notes.append(line)
        yield line


def _csv(name: str, stream: Any) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; bytes that are not UTF-8 become surrogates."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)  # the default is 131072 characters: less than a long document
    lines: list[str] = []  # of the row that is being read
    reader = csv.DictReader(
        _noted(text, lines), delimiter="\t" if Path(name).stem.endswith(".tsv") or ".tsv" in name else ","
    )
    columns = list(reader.fieldnames or [])
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"data: {name}, line 1: the column {twice!r} comes twice.")
    while True:
        lines.clear()
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Row(f"{name}, line {reader.line_num}", None, f"not valid CSV: {error}")
            continue
        if values is None:
            return
        where = f"{name}, line {reader.line_num}"
        if len(lines) > 1 and "".join(lines).count('"') % 2:  # only at the end of the file can a quote stay open
            yield Row(
                f"{name}, line {reader.line_num - len(lines) + 1}", None, "a quote that is opened here is not closed"
            )
        elif None in values or None in values.values():
            yield Row(where, None, f"does not have the {len(columns)} columns of the first line")
        else:
            yield Row(where, dict(values))
