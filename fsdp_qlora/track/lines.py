"""JSON lines: one value per line, valid UTF-8 for any text.

Read them back by splitting at line feeds: ``str.splitlines`` also splits at Unicode's other line separators, which JSON
does not escape. UTF-8 cannot encode a lone surrogate, so it is written as a JSON escape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsdp_qlora.files.write import append_to, write_text
from fsdp_qlora.track.unwritten import Unwritten


def to_line(value: Any) -> str:
    """Return ``value`` as a line of JSON that encodes to valid UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def write_lines(file: Path, values: Iterable[Any]) -> None:
    """Write the values, one per line."""
    write_text(file, "".join(map(to_line, values)))


def read_lines(file: Path) -> list[Any]:
    """Return the values of a file, ignoring a partial last line left by a killed run."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]


class Appended:
    """Appends lines to a file; if a write fails, keeps them for the next attempt and records it in ``unwritten``."""

    def __init__(self, file: Path, unwritten: Unwritten) -> None:
        self._file, self._unwritten, self._pending = file, unwritten, b""

    def add(self, line: str) -> None:
        """Append a line."""
        self._pending += line.encode()
        self.flush()

    def flush(self) -> None:
        """Write the pending lines."""
        self._unwritten.attempt(self._file, self._write)

    def forget(self) -> None:
        """Drop the pending lines."""
        self._pending = b""

    def _write(self) -> None:
        with append_to(self._file) as stream:
            while self._pending:
                self._pending = self._pending[stream.write(self._pending) :]
