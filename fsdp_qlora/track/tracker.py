"""metrics.jsonl (the truth), and the console or W&B beside it. Only rank 0 has one that does anything."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fsdp_qlora.errors import typed_line
from fsdp_qlora.files import append_to, read_regular, replacing


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
        self._stream = append_to(file)

    def _cut(self, step: int) -> None:
        lines = read_regular(self._file, None).splitlines(keepends=True)
        with replacing(self._file) as stream:
            stream.writelines(line for line in lines if step and _step_of(line) <= step)

    def rewind(self, step: int) -> None:
        """Cut the lines of later steps."""
        self._stream.close()
        self._cut(step)
        self._stream = append_to(self._file)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line."""
        self._stream.write(json.dumps({"time": round(time.time(), 3), "step": step, **values}).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: bytes) -> float:
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

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Hand the values of a step to every sink."""
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
