"""What a rank is doing: phases that all ranks enter in the same order, and within them work that it does alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

AT_REST = ""
"""Name of the idle phase."""


@dataclass
class Phases:
    """What one thread of this rank is doing; written by that thread, read by the watch's thread."""

    number: int = 0
    """Index of the phase; equal on all ranks that are in the same phase."""
    name: str = "start"
    entered: float = field(default_factory=time.time)
    alone: bool = False
    """Whether this rank is doing work that waits for no other rank."""
    signs: int = 0
    """Progress counter; grows whenever this rank gets something done."""

    def enter(self, name: str) -> None:
        """Enter the next phase."""
        self.number, self.name, self.entered, self.signs = self.number + 1, name, time.time(), self.signs + 1

    def rest(self) -> None:
        """Become idle until the next `enter`."""
        self.enter(AT_REST)

    def sign(self) -> None:
        """Record progress."""
        self.signs += 1

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """Mark work that waits for no other rank, such as writing a file; without progress, it holds up all others."""
        around, self.alone = self.alone, True
        self.sign()
        try:
            yield
        finally:
            self.alone = around
            self.sign()
