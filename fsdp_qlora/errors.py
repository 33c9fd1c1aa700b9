"""Errors that a user can fix: each carries its exit code and says what to do.

Any other exception that escapes is a bug of ours and ends the process with code 1 and a traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

REMEDIES = {
    errno.ENOSPC: "free up space", errno.EDQUOT: "free up space in the quota", errno.EACCES: "", errno.EPERM: "",
    errno.EROFS: "it is mounted read-only", errno.EIO: "", errno.ESTALE: "the network file system has lost it",
    errno.ENOTDIR: "", errno.ENAMETOOLONG: "choose shorter names", errno.ELOOP: "its links form a loop",
    errno.EFBIG: "raise the limit on files (ulimit -f)", errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine's limit on open files is reached", errno.ENOTSUP: "this file system does not support it",
    errno.ENOSYS: "this file system does not support it", errno.ENOLCK: "this file system does not support locks",
    errno.ENOMEM: "the machine has no memory left for it (see also `ulimit -v`)",
    errno.EAGAIN: "raise the limit on processes (ulimit -u)",
}  # fmt: skip
"""Operating-system errors that are not bugs of ours -> what helps."""


class FsdpQloraError(Exception):
    """An error with a message for the user; the process ends with ``exit_code``."""

    exit_code = 1
    alike = False
    """Whether every rank raises the same error, so that only rank 0 prints it."""


class ConfigError(FsdpQloraError):
    """The configuration is wrong: an unknown key, a wrong type, or settings that exclude each other."""

    exit_code = 2


class PlanError(ConfigError):
    """The configuration is valid but cannot be carried out with this model or on this machine."""


class ModelError(ConfigError):
    """The base model cannot be found, read or trained as requested."""


class DataError(ConfigError):
    """The data cannot be found or read, or holds nothing to learn from."""


class RunFolderError(ConfigError):
    """The run folder is in use, or holds a run that these settings must not change."""


class CheckpointError(FsdpQloraError):
    """A checkpoint is damaged or incomplete, or a required one is missing."""

    exit_code = 65


class StorageError(FsdpQloraError):
    """Reading or writing failed: disk full, no permission."""

    exit_code = 74


class SecurityError(FsdpQloraError):
    """A file tries to do something that no legitimate file needs."""

    exit_code = 77


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def typed_line(error: BaseException) -> str:
    """Return a foreign error in one line: its type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def with_remedy(error: BaseException) -> str:
    """Return an error's message, and what helps if it is one of `REMEDIES`."""
    remedy = REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    return f"{error} ({remedy})" if remedy else str(error)


def attempt(work: Callable[[], _T]) -> tuple[_T | None, dict[str, Any]]:
    """Return the result of ``work``, and the verdict to pass to `raise_alike` on all ranks if it failed."""
    try:
        return work(), {}
    except FsdpQloraError as error:
        return None, {"code": error.exit_code, "message": str(error)}
    except OSError as error:
        return None, {"code": StorageError.exit_code, "message": str(error)}


def raise_alike(verdict: dict[str, Any]) -> None:
    """Raise the error in ``verdict``, which has ``code`` and ``message`` if another rank failed."""
    if "code" in verdict:
        error = FsdpQloraError(verdict["message"])
        error.exit_code, error.alike = verdict["code"], True
        raise error


class NonFiniteError(FsdpQloraError):
    """The loss or the gradient is not a finite number; the update was not made."""


class LossSpikeError(NonFiniteError):
    """The loss is far above its recent values; the update was not made."""


class NumericsError(FsdpQloraError):
    """A check of the run's own invariants failed (bytes, ties, gradients)."""


STOPPED_EXIT_CODE = 75
"""Stopped early on a signal, after saving if there was anything to save: not an error, so not an exception."""
