"""Follows a metrics.jsonl that may be growing, cut back by a resume, or damaged."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora.files.read import open_regular

Line = dict[str, Any]
_LONGEST_LINE = 1_000_000
"""Bytes of a line; none that we write comes near."""


@dataclass
class Metrics:
    """The lines of a metrics.jsonl, sorted by what they tell."""

    steps: list[Line] = field(default_factory=list)
    """Lines of training: ``loss``, ``lr``, ``grad_norm``, ..."""
    evaluations: list[Line] = field(default_factory=list)
    """Lines with ``eval_loss``."""
    events: list[Line] = field(default_factory=list)
    """All other lines: checkpoints, bad steps."""
    unreadable: int = 0
    """Complete lines that are not JSON objects with a step."""

    @property
    def last_step(self) -> int:
        """The newest step of any line; 0 if there is none."""
        return max((lines[-1]["step"] for lines in (self.steps, self.evaluations, self.events) if lines), default=0)

    @property
    def last_time(self) -> float | None:
        """When the newest line was written, in seconds since 1970; None if there is none."""
        times = [number(lines[-1], "time") for lines in (self.steps, self.evaluations, self.events) if lines]
        return max((time for time in times if time is not None), default=None)

    def add(self, text: bytes) -> None:
        """Add a complete line."""
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not _is_step(line.get("step")):
            self.unreadable += 1
        elif number(line, "loss") is not None:
            self.steps.append(line)
        elif "eval_loss" in line:
            self.evaluations.append(line)
        else:
            self.events.append(line)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def number(line: Line, key: str) -> float | None:
    """Return a finite number of a line, or None if it has none by this name."""
    value = line.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of more than 308 digits
        return None


class MetricsFile:
    """Reads a metrics.jsonl, and later only what has been added to it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._opened: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        self.metrics = Metrics()

    def poll(self) -> Metrics:
        """Return all complete lines so far; a partial last line counts when it is complete.

        Raises:
            OSError: if the file is missing or cannot be read.
            SecurityError: if it is not a regular file.
        """
        with os.fdopen(open_regular(self._file), "rb") as stream:
            status = os.fstat(stream.fileno())
            if self._opened != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                # A resume has cut the file back, by replacing it.
                self._opened, self._offset, self._rest = (status.st_dev, status.st_ino), 0, b""
                self.metrics = Metrics()
            stream.seek(self._offset)
            while block := stream.read(1 << 20):
                self._offset += len(block)
                *lines, self._rest = (self._rest + block).split(b"\n")
                for line in lines:
                    if line.strip():
                        self.metrics.add(line[:_LONGEST_LINE])
                self._rest = self._rest[: _LONGEST_LINE + 1]
        return self.metrics


def mapping(value: Any) -> dict[str, Any]:
    """Return a JSON value if it is an object; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """Return the objects in a JSON list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
