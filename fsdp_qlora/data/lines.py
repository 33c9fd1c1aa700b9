"""Lines of text -> rows, in bounded memory: a line that is too long is skipped without being held in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_ROW = 64 * 2**20
"""Maximum size of a row: bytes in its file, and characters of the text that a template makes of it.

A compressed file of a few megabytes can expand to a line of any size, and turning a line into tokens takes many times
its size in memory.
"""
TOO_LONG = f"is longer than the limit of {MAX_ROW >> 20} MiB per row"
CHUNK = 2**20
"""Bytes or characters to read at once when not reading row by row."""


@dataclass(frozen=True)
class Row:
    """One row, or the reason why it cannot be read."""

    where: str
    """File and line, or file and row number."""
    values: Mapping[str, Any] | None
    problem: str = ""
    """What is wrong with the row, if ``values`` is None."""
    size: int = 0
    """Approximate size in memory in bytes; 0 if unknown."""
    folder: str = ""
    """Folder from which relative paths in the row start; empty if the row is in no local file."""


def text_lines(name: str, stream: BinaryIO, limit: int = MAX_ROW) -> Iterator[Row]:
    """Yield non-blank lines as ``{"line": text}``; lines that are too long, not UTF-8 or contain NUL as problems."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > limit:
            while line and not line.endswith(b"\n"):
                line = stream.readline(CHUNK)
            yield Row(where, None, TOO_LONG)
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Row(where, None, f"not valid UTF-8 at byte {error.start + 1} of the line")
            continue
        if "\0" in text:
            yield Row(where, None, "holds a NUL character")
        elif text.strip():
            yield Row(where, {"line": text}, size=len(line))
