"""File locks held by the kernel, which releases them when the process ends, even on kill -9."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsdp_qlora.files.read import LACKING


@contextmanager
def alone(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on ``file``, a lock file that is removed afterwards.

    Yields whether the lock is held. It is not if another process holds it and ``wait`` is false, or if the file system
    does not support locks.
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
        os.close(handle)  # the previous holder has removed the file, and others may have locked a new one by now


def try_lock(handle: int, how: int) -> bool:
    """Lock an open file; return False if another process holds it or the file system does not support locks."""
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
