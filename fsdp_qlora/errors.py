"""What a user can fix: every error carries its exit code and says what to do.

Anything else that escapes is a bug of ours and ends with code 1 and a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


class FsdpQloraError(Exception):
    """An error with a message for the user; ``exit_code`` is the process's."""

    exit_code = 1
    alike = False
    """Whether every rank raises the same; then rank 0 alone says so."""


class ConfigError(FsdpQloraError):
    """The configuration is wrong: a key, a type, a pair that cannot go together."""

    exit_code = 2


class PlanError(ConfigError):
    """The configuration is well formed but cannot be carried out on this model or machine."""


class ModelError(ConfigError):
    """The base model cannot be found, read or trained as asked."""


class DataError(ConfigError):
    """The data cannot be found or read, or holds nothing to learn from."""


class RunFolderError(ConfigError):
    """The run folder is in use or holds something the settings do not allow to touch."""


class CheckpointError(FsdpQloraError):
    """A checkpoint is damaged, incomplete or missing where it was demanded."""

    exit_code = 65


class StorageError(FsdpQloraError):
    """Reading or writing failed: disk full, no permission."""

    exit_code = 74


class SecurityError(FsdpQloraError):
    """A file asks for something that no honest file needs."""

    exit_code = 77


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def typed_line(error: BaseException) -> str:
    """Return an error of somebody else's code in one line: its type and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def attempt(work: Callable[[], _T]) -> tuple[_T | None, dict[str, Any]]:
    """Return what ``work`` gives, and what `raise_alike` takes on other ranks if it failed."""
    try:
        return work(), {}
    except FsdpQloraError as error:
        return None, {"code": error.exit_code, "message": str(error)}
    except OSError as error:
        return None, {"code": StorageError.exit_code, "message": str(error)}


def raise_alike(verdict: dict[str, Any]) -> None:
    """Raise on this rank what rank 0 met: ``verdict`` has ``code`` and ``message`` if it failed."""
    if "code" in verdict:
        error = FsdpQloraError(verdict["message"])
        error.exit_code, error.alike = verdict["code"], True
        raise error


class NonFiniteError(FsdpQloraError):
    """The loss or the gradient is not a finite number; the update was not made."""


class LossSpikeError(NonFiniteError):
    """The loss is far above what it was; the update was not made."""


class NumericsError(FsdpQloraError):
    """A check of the run's own invariants failed (bytes, ties, gradients)."""


STOPPED_EXIT_CODE = 75
"""Stopped early on a signal, after saving: not an error, so not an exception."""
