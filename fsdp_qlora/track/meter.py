"""Speed and memory of the last window of steps; time spent evaluating or saving is not in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Adds up the time and tokens of steps between two readings."""

    def __init__(self) -> None:
        self._seconds = self._tokens = self._steps = 0.0
        self.total_seconds = self.total_tokens = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._seconds += seconds
        self._steps += 1
        self.total_seconds += seconds

    def count(self, tokens: int) -> None:
        """Add the tokens (over all ranks) of the step just timed."""
        self._tokens += tokens
        self.total_tokens += tokens

    def read(self) -> dict[str, float]:
        """Return the window's speed and start a new window."""
        steps, seconds = max(1.0, self._steps), max(1e-9, self._seconds)
        values = {"tokens_per_second": self._tokens / seconds, "step_seconds": self._seconds / steps}
        self._seconds = self._tokens = self._steps = 0.0
        return values
