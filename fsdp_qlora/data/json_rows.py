"""JSON and JSON lines -> rows, in bounded memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from fsdp_qlora.data.lines import CHUNK, MAX_ROW, TOO_LONG, Row, text_lines
from fsdp_qlora.errors import DataError

_MAX_DIGITS = 4300
"""Python's default limit on the digits of an integer; it raises beyond that."""
_BLANK = re.compile(r"[ \t\r\n]*")

Open = Callable[[], AbstractContextManager[BinaryIO]]


def json_lines(name: str, stream: BinaryIO, limit: int = MAX_ROW) -> Iterator[Row]:
    """Yield the rows of a file with a JSON object on each line."""
    parse = _Parser()
    for row in text_lines(name, stream, limit):
        if row.values is None:
            yield row
            continue
        try:
            yield parse.row(row.where, row.values["line"].strip(), 0)[0]
        except json.JSONDecodeError as error:
            yield Row(row.where, None, f"not valid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            yield Row(row.where, None, "not valid JSON: nested too deeply")


def json_rows(name: str, open_file: Open, limit: int = MAX_ROW) -> Iterator[Row]:
    """Yield the rows of a JSON file: an array, a single object over several lines, or one object per line."""
    with open_file() as stream:
        is_array = _first_byte(stream) == b"["
    with open_file() as stream:
        if is_array:
            yield from _array(name, stream, limit)
            return
        data = stream.read(limit + 1)
    if len(data) <= limit:
        row = _one_object(name, data)
        yield from json_lines(name, io.BytesIO(data), limit) if row is None else (row,)
        return
    del data
    with open_file() as stream:
        yield from json_lines(name, stream, limit)


def _first_byte(stream: BinaryIO) -> bytes:
    """Return the first byte that is not white space."""
    data = stream.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    while data:
        if data.strip():
            return data.lstrip()[:1]
        data = stream.read(CHUNK)
    return b""


def _one_object(name: str, data: bytes) -> Row | None:
    """Return the row of a file that is a single object over several lines; None for any other file."""
    text = data.decode("utf-8-sig", "surrogateescape").strip()
    try:
        return _Parser().row(f"{name}, row 1", text, 0)[0] if "\n" in text else None
    except (ValueError, RecursionError):
        return None


class _Window:
    """The part of a long text held in memory. Invalid UTF-8 becomes surrogates, which are rejected later if used."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._before = 0
        self.text, self.at, self.ended = "", 0, False

    def read_on(self) -> None:
        """Drop the text before `at`, then read at least as much as is left, so that long values take few steps."""
        data = self._stream.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not data
        self._before += self.at
        self.text, self.at = self.text[self.at :] + self._decoder.decode(data, final=self.ended), 0

    def next_char(self) -> str:
        """Advance to the next character that is not white space and return it; "" at the end."""
        while True:
            match = _BLANK.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def place(self, at: int) -> int:
        """Return the position of a character in the whole text, counted from 1."""
        return self._before + at + 1


def _array(name: str, stream: BinaryIO, limit: int) -> Iterator[Row]:
    """Yield the rows of an array.

    Raises:
        DataError: if the syntax is broken, or a row is too long to be read to its end: later rows cannot be found.
    """
    parse, window, number = _Parser(), _Window(stream), 1
    window.next_char()
    window.at += 1
    if window.next_char() == "]":
        return
    while True:
        window.next_char()
        try:
            row = _value(parse, window, f"{name}, row {number}", limit)
            if (after := window.next_char()) not in (",", "]") or not after:
                raise json.JSONDecodeError("Expecting ',' or ']'", window.text, window.at)
        except (ValueError, RecursionError) as error:
            said = "nested too deeply"
            if isinstance(error, json.JSONDecodeError):
                said = f"{error.msg} at character {window.place(error.pos)}"
            raise DataError(
                f"data: {name}, row {number} is not valid JSON, so no later row can be read: {said}"
            ) from error
        yield row
        if after == "]":
            return
        window.at, number = window.at + 1, number + 1


def _value(parse: _Parser, window: _Window, where: str, limit: int) -> Row:
    """Parse one value of an array, reading more text until it is complete."""
    while True:
        try:
            row, end = parse.row(where, window.text, window.at, whole=False)
        except json.JSONDecodeError:
            if window.ended:
                raise
        else:
            if end - window.at > limit:
                row = Row(where, None, TOO_LONG)
            if end < len(window.text) or window.ended:  # otherwise a number may continue in the next chunk
                window.at = end
                return row
        if len(window.text) - window.at > limit:
            raise DataError(f"data: {where} {TOO_LONG}, so no later row can be read.")
        window.read_on()


class _Parser:
    """Parses objects and detects duplicate keys, of which Python silently keeps the last, and overlong integers."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = next(key for key, _ in pairs if sum(1 for other, _ in pairs if other == key) > 1)
            self._problem = f"the key {twice!r} appears twice"
        return values

    def _integer(self, text: str) -> int:
        if len(text) > _MAX_DIGITS:
            self._problem = f"holds an integer of {len(text)} digits"
            return 0
        return int(text)

    def row(self, where: str, text: str, start: int, whole: bool = True) -> tuple[Row, int]:
        """Return the row whose JSON starts at ``start``, and the position of its end.

        Raises:
            json.JSONDecodeError: if there is no valid JSON, or, with ``whole``, if the JSON does not end the text.
        """
        self._problem = None
        value, end = self._decoder.raw_decode(text, start)
        if whole and end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        if self._problem is not None:
            return Row(where, None, self._problem), end
        if not isinstance(value, dict):
            return Row(where, None, f"expected an object {{...}}, got {type(value).__name__}"), end
        return Row(where, value, size=end - start), end
