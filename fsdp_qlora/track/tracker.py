"""metrics.jsonl (the truth), and the console or W&B beside it. Only rank 0 has one that does anything."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from fsdp_qlora.errors import typed_line


class Sink(Protocol):
    """Something that takes metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the values of a step."""

    def rewind(self, step: int) -> None:
        """Forget what was logged of later steps, where that is possible."""

    def close(self) -> None:
        """Write out what is pending."""


class JsonLines:
    """metrics.jsonl: one JSON object a line, flushed as written."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Open for appending; lines after ``resume_step`` are of steps that a resume does again, and are cut."""
        self._file = file
        if file.exists():
            self._cut(resume_step)
        self._stream = file.open("a", encoding="utf-8")

    def _cut(self, step: int) -> None:
        kept = [
            line for line in self._file.read_text(encoding="utf-8").splitlines(keepends=True) if _step_of(line) <= step
        ]
        staging = self._file.with_name(f".{self._file.name}.tmp")
        staging.write_text("".join(kept if step else []), encoding="utf-8")
        staging.replace(self._file)

    def rewind(self, step: int) -> None:
        """Cut the lines of later steps."""
        self._stream.close()
        self._cut(step)
        self._stream = self._file.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line."""
        self._stream.write(json.dumps({"time": round(time.time(), 3), "step": step, **values}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, from a run that was killed


class Beside:
    """A sink that the run does not depend on: when it fails, that is reported once, and it gets nothing more."""

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink: Sink | None = sink
        self._name = name

    def _try(self, work: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            work(self._sink)
        except Exception as error:  # whatever it stands on: a service, a socket, a full disk
            self._sink = None
            print(
                f"fsdp-qlora: {self._name} failed and gets no more values ({typed_line(error)}); "
                "metrics.jsonl has everything.",
                file=sys.stderr,
                flush=True,
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the values of a step."""
        self._try(lambda sink: sink.log(step, values))

    def rewind(self, step: int) -> None:
        """Forget what was logged of later steps, where that is possible."""
        self._try(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Write out what is pending."""
        self._try(lambda sink: sink.close())


class Tracker:
    """Several sinks as one."""

    def __init__(self, sinks: list[Sink], around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Send to ``sinks``, in order; ``around`` tells who watches this rank that files are written."""
        self._sinks, self._around = sinks, around

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Hand the values of a step to every sink."""
        with self._around():
            for sink in self._sinks:
                sink.log(step, values)

    def rewind(self, step: int) -> None:
        """Let every sink forget later steps."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()
