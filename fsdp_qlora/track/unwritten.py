"""Failed writes during a run: a reason to save and stop, not to lose the steps since the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fsdp_qlora.errors import SecurityError, StorageError


class Unwritten:
    """Remembers the first file of a run that could not be written; used by rank 0, which writes them."""

    def __init__(self) -> None:
        self.problem = ""

    def attempt(self, file: Path, write: Callable[[], None]) -> None:
        """Write ``file``; if that fails the run continues, and stops once it has saved."""
        try:
            write()
        except OSError as error:
            self.problem = self.problem or f"{file} cannot be written: {error.strerror or error}."
        except SecurityError as error:  # something else was put in its place meanwhile
            self.problem = self.problem or f"{file} cannot be written: {error}"

    def require_none(self) -> None:
        """Raise for a failed write; call it once the run is saved.

        Raises:
            StorageError: if a file could not be written, naming it.
        """
        if self.problem:
            raise StorageError(
                f"{self.problem} The run was saved and stopped; free up space or fix it, and the same command resumes."
            )
