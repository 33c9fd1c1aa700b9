"""Signals that mean "save and leave": seen here, made a decision of all ranks by the step's own reduction."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Self

_SIGNALS = tuple(s for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if (s := getattr(signal, name, None)) is not None)


class StopSignals:
    """Remembers that one of SIGTERM, SIGINT, SIGUSR1 or SIGHUP came; restores the old handlers on its last exit."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if threading.current_thread() is threading.main_thread() and not self._before:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT and "RANK" not in os.environ:
            os._exit(130)  # a second Ctrl-C of a single process; for ranks the launcher counts
        self.received = number

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
