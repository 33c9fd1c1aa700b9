"""What a destination for metrics is, and what it is told when a run ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol


class State(Enum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """By a signal, after saving: the run can be resumed."""
    FAILED = "failed"


@dataclass(frozen=True)
class Ended:
    """How a run ended, and what it leaves behind."""

    state: State
    message: str = ""
    """Of the failure."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Contents of summary.json, if the run finished."""
    adapter: Path | None = None
    """Folder of the adapter, or of the trained model, if the run finished."""


class Sink(Protocol):
    """A destination for metrics. Any method may raise: `Beside` then reports it once, and the run goes on."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values of a step: numbers by name; the note on a bad step also has texts and lists."""

    def rewind(self, step: int) -> None:
        """Discard what was logged for later steps, if the sink can."""

    def close(self) -> None:
        """Write out what is pending: no step follows."""

    def end(self, ended: Ended) -> None:
        """Take note of how the run ended: nothing follows."""


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the values that are numbers."""
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
