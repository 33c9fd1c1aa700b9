"""JSON lines: one value a line, in UTF-8, whatever the texts hold.

``str.splitlines`` also splits at the line separators that Unicode has besides the line feed, and JSON does not escape
those. A lone surrogate, which UTF-8 cannot hold, is written as JSON's own escape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsdp_qlora.files.write import append_to, write_text
from fsdp_qlora.track.unwritten import Unwritten


def to_line(value: Any) -> str:
    """Return ``value`` as a line of JSON that any reader of UTF-8 takes."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def write_lines(file: Path, values: Iterable[Any]) -> None:
    """Write the values, one a line."""
    write_text(file, "".join(map(to_line, values)))


def read_lines(file: Path) -> list[Any]:
    """Return the values of a file; half a line at its end, of a run that was killed, is none."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]


class Appended:
    """Lines at the end of a file. One that cannot be written waits for the next one, and ``unwritten`` is told."""

    def __init__(self, file: Path, unwritten: Unwritten) -> None:
        self._file, self._unwritten, self._pending = file, unwritten, b""

    def add(self, line: str) -> None:
        """Append a line."""
        self._pending += line.encode()
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        self._unwritten.attempt(self._file, self._write)

    def forget(self) -> None:
        """Drop what waits."""
        self._pending = b""

    def _write(self) -> None:
        with append_to(self._file) as stream:
            while self._pending:
                self._pending = self._pending[stream.write(self._pending) :]
