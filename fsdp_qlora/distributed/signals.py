"""Signals that mean "save and exit": received here, turned into a decision of all ranks by the step's reduction."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = tuple(
    s for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if (s := getattr(signal, name, None)) is not None
)

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers


def heeded(numbers: Iterable[int]) -> list[int]:
    """Return the signals that are not currently ignored.

    `nohup`, and a shell that starts a background job, make a process ignore some signals; that choice is respected.
    """
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def take_signals(numbers: Iterable[int], handler: Handler) -> dict[int, Handler]:
    """Install ``handler`` for the signals that are not ignored; return the old handlers for `give_back_signals`."""
    before = {number: signal.signal(number, handler) for number in heeded(numbers)}
    return {number: old for number, old in before.items() if old is not None}  # None: installed from C code


def give_back_signals(before: Mapping[int, Handler]) -> None:
    """Restore the old handlers."""
    for number, old in before.items():
        signal.signal(number, old)


class StopSignals:
    """Records SIGTERM, SIGINT, SIGUSR1 or SIGHUP; reentrant, and restores the old handlers on the outermost exit.

    Signals that are ignored stay ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.something_to_save = False
        """Whether a run that stops now has something to save; if not, it may stop before its next step."""
        self._before: dict[int, Handler] = {}
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = take_signals(STOP_SIGNALS, self._remember)
        return self

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT and "RANK" not in os.environ:
            os._exit(130)  # second Ctrl-C in a single process; with several ranks the launcher counts them
        self.received = number

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        give_back_signals(self._before)
        self._before = {}
