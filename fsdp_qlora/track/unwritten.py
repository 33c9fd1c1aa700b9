"""What a run could not write on its way: a reason to save and stop, not to lose the steps since the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fsdp_qlora.errors import SecurityError, StorageError


class Unwritten:
    """Remembers the first file of a run that could not be written; for rank 0, which writes them."""

    def __init__(self) -> None:
        self.problem = ""

    def attempt(self, file: Path, write: Callable[[], None]) -> None:
        """Write ``file``; where that fails the run goes on, and stops as soon as it has saved."""
        try:
            write()
        except OSError as error:
            self.problem = self.problem or f"{file} cannot be written: {error.strerror or error}."
        except SecurityError as error:  # somebody has put something else in its place meanwhile
            self.problem = self.problem or f"{file} cannot be written: {error}"

    def require_none(self) -> None:
        """Raise what happened, once the run is saved.

        Raises:
            StorageError: naming the file.
        """
        if self.problem:
            raise StorageError(
                f"{self.problem} The run was saved and stopped; make room or mend it, and the same command goes on."
            )
