"""CSV and TSV -> rows, in bounded memory."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fsdp_qlora.data.lines import CHUNK, MAX_ROW, TOO_LONG, Row
from fsdp_qlora.errors import DataError


class _TooLongError(Exception):
    """A row does not end within the limit."""


class _Lines:
    """Feeds the lines of a CSV file to `csv.reader` and tracks the row being read."""

    def __init__(self, text: io.TextIOWrapper, limit: int) -> None:
        self._text, self._limit, self._fresh = text, limit, True
        self.number = 0
        """Number of the last line read."""
        self.begin()

    def begin(self) -> None:
        """Start a new row."""
        self.size = 0
        """Characters of the row read so far."""
        self.count = 0
        """Lines of the row read so far, not counting blank lines before it."""
        self.is_open = False
        """Whether the row has an unclosed quote."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._read(self._limit - self.size + 1)
        if not line:
            raise StopIteration
        if self.count or line.strip("\r\n"):
            self.count += 1
            self.size += len(line)
            self.is_open ^= line.count('"') % 2 == 1
        if self.size > self._limit:
            self._pass_over(line)
            raise _TooLongError
        return line

    def _read(self, limit: int) -> str:
        line = self._text.readline(limit)
        self.number += self._fresh and bool(line)
        self._fresh = line.endswith(("\n", "\r"))
        return line

    def _pass_over(self, line: str) -> None:
        """Skip to the end of a row that is too long: the next line end with no open quote."""
        while line and (self.is_open or not self._fresh):
            line = self._read(CHUNK)
            self.is_open ^= line.count('"') % 2 == 1


def csv_rows(name: str, stream: BinaryIO, limit: int = MAX_ROW) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; invalid UTF-8 becomes surrogates, which are rejected later if used."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is too small for a long document
    lines = _Lines(text, limit)
    reader = csv.DictReader(lines, delimiter="\t" if Path(name).stem.endswith(".tsv") or ".tsv" in name else ",")
    try:
        columns = list(reader.fieldnames or [])
    except _TooLongError:
        raise DataError(f"data: {name}, line 1: {TOO_LONG}.") from None
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"data: {name}, line 1: the column {twice!r} appears twice.")
    while True:
        lines.begin()
        before = lines.number
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Row(f"{name}, line {lines.number}", None, f"not valid CSV: {error}")
            continue
        except _TooLongError:
            yield Row(f"{name}, line {before + 1}", None, TOO_LONG)
            continue
        if values is None:
            return
        where = f"{name}, line {lines.number}"
        if lines.count > 1 and lines.is_open:  # a quote can stay open only at the end of the file
            first = lines.number - lines.count + 1
            yield Row(f"{name}, line {first}", None, "a quote opened here is never closed")
        elif None in values or None in values.values():
            yield Row(where, None, f"does not have the {len(columns)} columns of the first line")
        else:
            yield Row(where, dict(values), size=lines.size)
