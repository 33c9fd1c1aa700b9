"""Lines of text -> rows, in bounded memory: of a line that is too long no more is held than a row may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_ROW = 64 * 2**20
"""Bytes that a row may take in its file, and characters of the text that a template makes of it.

A file of some megabytes can unfold to a line of any size (compression), and a line needs many times its size in memory
before it is tokens.
"""
TOO_LONG = f"is longer than the {MAX_ROW >> 20} MiB that a row may take"
CHUNK = 2**20
"""Bytes or characters that are read at once where no row is wanted."""


@dataclass(frozen=True)
class Row:
    """One row, or why there is none."""

    where: str
    """File and line, or file and row number."""
    values: Mapping[str, Any] | None
    problem: str = ""
    """What is wrong with it, where ``values`` is None."""
    size: int = 0
    """Bytes that it takes in memory, roughly; 0 where that is unknown."""


def text_lines(name: str, stream: BinaryIO, limit: int = MAX_ROW) -> Iterator[Row]:
    """Yield lines that are not blank as ``{"line": text}``; what is not UTF-8 or too long as a problem."""
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
