"""Feeds sinks that others provide from a thread: neither their errors nor their delays reach the run."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from fsdp_qlora.errors import typed_line
from fsdp_qlora.track.sink import Ended, Sink, State

_log = logging.getLogger(__name__)

_LAST_SECONDS = 120.0
"""How long a finished run waits for a sink to take what is left: uploads, above all."""
_SOONER = {State.STOPPED: 20.0, State.FAILED: 5.0}
"""The same for a run that others wait for to end: a scheduler that will kill it, its other ranks, the launcher."""
_LAG = 10_000
"""Calls that may wait; a sink that is further behind stands still."""


class Behind(Sink):
    """Passes calls to a sink, in order, from a thread. Its first failure is reported, and it receives nothing more."""

    def __init__(self, name: str, open_sink: Callable[[], Sink | None], last_seconds: float = _LAST_SECONDS) -> None:
        """Open the sink, which may fail as well.

        Args:
            name: what to call it in the warning.
            open_sink: opens it, in this thread: some libraries want the main one. None if there is nothing to feed.
            last_seconds: how long `end` waits.
        """
        self._name, self._last_seconds = name, last_seconds
        self._calls: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(_LAG)
        self._failed = threading.Event()
        self._done = threading.Event()
        sink: Sink | None = None
        try:
            sink = open_sink()
        except Exception as error:  # a service, a socket, a full disk, a library: none may stop the run
            self._report(typed_line(error))
        if sink is None:
            self._failed.set()
        else:
            threading.Thread(target=self._feed, args=(sink,), name=f"feeds {name}", daemon=True).start()

    def _report(self, why: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            failed = "%s failed and receives no more values (%s); metrics.jsonl has everything."
            _log.warning(failed, self._name, why)

    def _feed(self, sink: Sink) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call(sink)
            except Exception as error:
                self._report(typed_line(error))
                break
        self._done.set()

    def _pass(self, call: Callable[[Sink], None] | None) -> None:
        if self._failed.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._report(f"it does not answer; {_LAG} calls are waiting")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values of a step."""
        self._pass(lambda sink: sink.log(step, values))

    def rewind(self, step: int) -> None:
        """Discard what was logged for later steps, if the sink can."""
        self._pass(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Write out what is pending."""
        self._pass(lambda sink: sink.close())

    def end(self, ended: Ended) -> None:
        """Take note of how the run ended, and wait for the sink to have taken everything."""
        self._pass(lambda sink: sink.end(ended))
        self._pass(None)
        seconds = min(self._last_seconds, _SOONER.get(ended.state, self._last_seconds))
        until = time.monotonic() + seconds
        while not (self._failed.is_set() or self._done.wait(0.05)):
            if time.monotonic() > until:
                self._report(f"it has not taken the last values within {seconds:.0f} s")
