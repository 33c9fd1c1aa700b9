"""Waiting for what may never come: the answer of a stopped process or of a storage that hangs, a sign of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Patience:
    """Asks in a thread of its own, and gives up on it after a while; at most one question is under way."""

    def __init__(self, seconds: float, who: str) -> None:
        self._seconds, self._who = seconds, who
        self._busy = threading.Lock()

    def ask(self, question: Callable[[], _T]) -> _T:
        """Return the answer, or raise what the question raised.

        Raises:
            TimeoutError: if there is no answer in time, or an earlier question still has none.
        """
        if not self._busy.acquire(timeout=self._seconds):
            raise TimeoutError(f"{self._who} does not answer")
        answer: list[_T] = []
        failure: list[Exception] = []

        def ask() -> None:
            try:
                answer.append(question())
            except Exception as error:  # of whatever kind: it is raised in the thread that asked
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
    """For how long things have been as they are, by a clock that stands still while this process is stopped."""

    def __init__(self, longest_look: float) -> None:
        """Start the clock; a look that comes later than ``longest_look`` seconds after the last one counts as that."""
        self._longest = longest_look
        self._clock, self._looked = 0.0, time.monotonic()
        self._seen: dict[str, tuple[Any, float]] = {}

    def look(self) -> None:
        """Move the clock on."""
        now = time.monotonic()
        self._clock += min(now - self._looked, self._longest)
        self._looked = now

    def unchanged(self, name: str, value: Any) -> float:
        """Return the seconds since ``value`` was first seen under this name."""
        if name not in self._seen or self._seen[name][0] != value:
            self._seen[name] = value, self._clock
        return self._clock - self._seen[name][1]
