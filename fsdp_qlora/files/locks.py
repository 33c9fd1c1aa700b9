"""Locks of the kernel, which lets go of them when their process ends, even after kill -9."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsdp_qlora.files.read import LACKING


@contextmanager
def alone(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that is the file ``file``, which is removed afterwards.

    Yields whether it is held. It is not where somebody else has it and this process does not ``wait``, and where the
    file system knows no locks.
    """
    handle = _locked(file, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)
            os.close(handle)


def _locked(file: Path, wait: bool) -> int | None:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if not try_lock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
            os.close(handle)
            return None
        if _names(file, handle):
            return handle
        os.close(handle)  # whoever had it has removed it, and others may hold a new one by now


def try_lock(handle: int, how: int) -> bool:
    """Lock an open file; return false where somebody else has it or the file system knows no locks."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LACKING:
            raise
        return False
    return True


def _names(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
