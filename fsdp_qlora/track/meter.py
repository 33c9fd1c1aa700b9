"""Throughput of the last window of steps, excluding time spent evaluating or saving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Window:
    """Totals over several steps; tokens and rows are summed over all ranks."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    """Without padding."""
    target_tokens: int = 0
    rows: int = 0


Achieved = Callable[[Window], dict[str, float]]
"""Computes the share of the peak speed that a window achieved, as values for metrics.jsonl."""


def _not_known(window: Window) -> dict[str, float]:
    return {}


class Meter:
    """Adds up the time and tokens of steps between two readings."""

    def __init__(self, achieved: Achieved = _not_known) -> None:
        self._window, self._achieved = Window(), achieved
        self.total_seconds = self.total_tokens = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for a step's batch, which is part of the step."""
        started = time.perf_counter()
        yield
        self._add(time.perf_counter() - started)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step."""
        started = time.perf_counter()
        yield
        self._add(time.perf_counter() - started)
        self._window.steps += 1

    def _add(self, seconds: float) -> None:
        self._window.seconds += seconds
        self.total_seconds += seconds

    def count(self, tokens: int, target_tokens: int, rows: int) -> None:
        """Add the counts of the step just timed, over all ranks."""
        window = self._window
        window.tokens, window.target_tokens = window.tokens + tokens, window.target_tokens + target_tokens
        window.rows += rows
        self.total_tokens += tokens

    def read(self) -> dict[str, float]:
        """Return the window's throughput and start a new window."""
        window, self._window = self._window, Window()
        steps, seconds = max(1, window.steps), max(1e-9, window.seconds)
        values = {"tokens_per_second": window.tokens / seconds, "step_seconds": window.seconds / steps}
        return values | (self._achieved(window) if window.seconds else {})
