"""JSON lines: one value a line, in UTF-8, whatever the texts hold.

``str.splitlines`` also splits at the line separators that Unicode has besides the line feed, and JSON does not escape
those. A lone surrogate, which UTF-8 cannot hold, is written as JSON's own escape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsdp_qlora.files import write_text


def to_line(value: Any) -> str:
    """Return ``value`` as a line of JSON that any reader of UTF-8 takes."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def write_lines(file: Path, values: Iterable[Any]) -> None:
    """Write the values, one a line."""
    write_text(file, "".join(map(to_line, values)))


def read_lines(file: Path) -> list[Any]:
    """Return the values of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
