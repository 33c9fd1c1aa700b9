"""What a rank is doing: phases that all ranks go through alike, and in them the work that one does by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

AT_REST = ""
"""Name of a phase in which nothing is under way."""


@dataclass
class Phases:
    """What one thread of this rank is doing; written by that thread, read by the watch's."""

    number: int = 0
    """The same on every rank in the same phase."""
    name: str = "start"
    entered: float = field(default_factory=time.time)
    alone: bool = False
    """Whether this rank does something that waits for no other rank."""
    signs: int = 0
    """Grows with whatever this rank gets done."""

    def enter(self, name: str) -> None:
        """Begin the next phase."""
        self.number, self.name, self.entered, self.signs = self.number + 1, name, time.time(), self.signs + 1

    def rest(self) -> None:
        """Nothing is under way until the next `enter`."""
        self.enter(AT_REST)

    def sign(self) -> None:
        """Say that the work moves on."""
        self.signs += 1

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """Do what waits for no other rank, such as writing a file: who gives no sign in it holds up all the others."""
        around, self.alone = self.alone, True
        self.sign()
        try:
            yield
        finally:
            self.alone = around
            self.sign()
