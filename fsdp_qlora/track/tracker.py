"""metrics.jsonl (the authoritative record) and the sinks beside it. Only rank 0's tracker has sinks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import typed_line
from fsdp_qlora.files.read import read_regular
from fsdp_qlora.files.write import append_to, replacing
from fsdp_qlora.track.lines import Appended
from fsdp_qlora.track.sink import Ended, Sink
from fsdp_qlora.track.unwritten import Unwritten

_log = logging.getLogger(__name__)


class JsonLines(Sink):
    """metrics.jsonl: one JSON object per line, written immediately."""

    def __init__(self, file: Path, resume_step: int, unwritten: Unwritten) -> None:
        """Start or continue the file; lines after ``resume_step`` are cut, because a resume repeats those steps."""
        self._file, self._unwritten = file, unwritten
        self._lines = Appended(file, unwritten)
        self._cut(resume_step)

    def _cut(self, step: int) -> None:
        append_to(self._file).close()
        lines = read_regular(self._file, None).splitlines(keepends=True)
        kept = [line for line in lines if step and _step_of(line) <= step]
        if kept != lines:
            with replacing(self._file) as stream:
                stream.writelines(kept)

    def rewind(self, step: int) -> None:
        """Remove the lines of later steps."""
        self._lines.forget()
        self._unwritten.attempt(self._file, lambda: self._cut(step))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a line."""
        self._lines.add(json.dumps({"time": round(time.time(), 3), "step": step, **values}) + "\n")

    def close(self) -> None:
        """Retry lines that could not be written earlier."""
        self._lines.flush()


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a partial line from a killed run


class Beside(Sink):
    """An optional sink: its first failure is reported, and it receives nothing more."""

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink: Sink | None = sink
        self._name = name

    def _try(self, work: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            work(self._sink)
        except Exception as error:  # a service, a socket, a full disk: none may stop the run
            self._sink = None
            failed = "%s failed and receives no more values (%s); metrics.jsonl has everything."
            _log.warning(failed, self._name, typed_line(error))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values of a step."""
        self._try(lambda sink: sink.log(step, values))

    def rewind(self, step: int) -> None:
        """Discard what was logged for later steps, if the sink can."""
        self._try(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Write out what is pending."""
        self._try(lambda sink: sink.close())

    def end(self, ended: Ended) -> None:
        """Take note of how the run ended."""
        self._try(lambda sink: sink.end(ended))


class Tracker:
    """Several sinks as one."""

    def __init__(self, sinks: list[Sink], around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Log to ``sinks`` in order, inside the context ``around``, which tells the watch that files are written."""
        self._sinks, self._around, self._closed = sinks, around, False

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values of a step to every sink."""
        with self._around():
            for sink in self._sinks:
                sink.log(step, values)

    def rewind(self, step: int) -> None:
        """Rewind every sink to ``step``."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Close every sink, once."""
        for sink in self._sinks if not self._closed else ():
            sink.close()
        self._closed = True

    def end(self, ended: Ended) -> None:
        """Tell every sink how the run ended."""
        self.close()
        with self._around():
            for sink in self._sinks:
                sink.end(ended)
