"""Bounded waits for things that may never happen: a reply from a stopped process or hung storage, a heartbeat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Patience:
    """Runs a call in its own thread and stops waiting after a timeout; at most one call is in flight."""

    def __init__(self, seconds: float, who: str) -> None:
        self._seconds, self._who = seconds, who
        self._busy = threading.Lock()

    def ask(self, question: Callable[[], _T]) -> _T:
        """Return what ``question`` returns, or raise what it raises.

        Raises:
            TimeoutError: if it does not return in time, or an earlier call is still in flight.
        """
        if not self._busy.acquire(timeout=self._seconds):
            raise TimeoutError(f"{self._who} does not answer")
        answer: list[_T] = []
        failure: list[Exception] = []

        def ask() -> None:
            try:
                answer.append(question())
            except Exception as error:  # any kind: it is re-raised in the asking thread
                failure.append(error)
            finally:
                self._busy.release()

        thread = threading.Thread(target=ask, name="ask", daemon=True)
        thread.start()
        thread.join(self._seconds)
        if failure:
            raise failure[0]
        if not answer:
            raise TimeoutError(f"{self._who} does not answer")
        return answer[0]


class Since:
    """Measures how long values have not changed, with a clock that pauses while this process is stopped."""

    def __init__(self, longest_look: float) -> None:
        """Start the clock; between two calls of `look` it advances by at most ``longest_look`` seconds."""
        self._longest = longest_look
        self._clock, self._looked = 0.0, time.monotonic()
        self._seen: dict[str, tuple[Any, float]] = {}

    def look(self) -> None:
        """Advance the clock."""
        now = time.monotonic()
        self._clock += min(now - self._looked, self._longest)
        self._looked = now

    def unchanged(self, name: str, value: Any) -> float:
        """Return the seconds since ``value`` was first seen under this name."""
        if name not in self._seen or self._seen[name][0] != value:
            self._seen[name] = value, self._clock
        return self._clock - self._seen[name][1]
