"""Signals that mean "save and leave": seen here, made a decision of all ranks by the step's own reduction."""

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
    """Return the signals that this process was not told to ignore when it was started.

    `nohup`, and a shell that starts something in the background, have signals ignored; that is a wish, and it stays.
    """
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def take_signals(numbers: Iterable[int], handler: Handler) -> dict[int, Handler]:
    """Install ``handler`` for the heeded ones; return what `give_back_signals` needs."""
    before = {number: signal.signal(number, handler) for number in heeded(numbers)}
    return {number: old for number, old in before.items() if old is not None}  # None: installed by C code


def give_back_signals(before: Mapping[int, Handler]) -> None:
    """Restore the old handlers."""
    for number, old in before.items():
        signal.signal(number, old)


class StopSignals:
    """Remembers that one of SIGTERM, SIGINT, SIGUSR1 or SIGHUP came; restores the old handlers on its last exit.

    Signals that the process was told to ignore stay ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.something_to_save = False
        """Whether a run that stops now has something to save; else it need not get as far as its next step."""
        self._before: dict[int, Handler] = {}
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = take_signals(STOP_SIGNALS, self._remember)
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
        give_back_signals(self._before)
        self._before = {}
