"""Temporary folders: next to the target that they become, or in the system's temporary folder.

The process that creates one holds a lock on it, which the kernel releases however the process ends. This tells
leftovers of a killed process from folders in use, even between containers that share files but not process ids.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsdp_qlora.errors import SecurityError
from fsdp_qlora.files.read import walk
from fsdp_qlora.files.write import staging_for, sync

_STAGING = re.compile(
    r"\.(.+\.[0-9a-f]{16}\.part|exit\.json\.\d+|metrics\.jsonl\.tmp|(latest|[a-z_]+\.(yaml|jsonl?))\.part)"
)
"""Names of files and folders written before a rename; those without 16 digits come from older versions."""
_YOUNG_SECONDS = 3600
"""A folder younger than this is kept: its process may be about to lock it."""


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Create a staging folder next to ``target``, for use with `move_into`; remove whatever remains of it at the end.

    Also removes staging folders for the same target that killed processes left behind.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = staging_for(target)
    staging.mkdir()
    with _held(staging):
        for left in list(target.parent.iterdir()):
            if left != staging and left.name.startswith(f".{target.name[:60]}.") and _STAGING.fullmatch(left.name):
                _remove_if_left(left)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder: if others find the lock free, the process that created the folder has ended."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def move_into(staging: Path, target: Path) -> None:
    """Move ``staging`` to ``target``: as one rename, or file by file if ``target`` is not empty.

    If two processes do this at once, one waits for the other, so their files are never mixed.

    Raises:
        SecurityError: if a folder in ``target`` is a link.
        OSError: if ``target`` cannot be written.
    """
    files = [Path(entry.path) for entry in walk(staging) if not entry.is_dir(follow_symlinks=False)]
    for path in (*files, staging):
        sync(path)
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        _move_files(files, staging, target)
    sync(target.absolute().parent)


def _move_files(files: Iterable[Path], staging: Path, target: Path) -> None:
    with _held(target):
        for file in files:
            place = target / file.relative_to(staging)
            place.parent.mkdir(exist_ok=True)
            if place.parent != target and place.parent.is_symlink():
                raise SecurityError(f"{place.parent} is a link; links are not followed here.")
            file.replace(place)
        sync(target)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in ``folder``; only its sole writer, which holds its lock, may call this."""
    for left in list(folder.iterdir()) if folder.is_dir() else []:
        if _STAGING.fullmatch(left.name):
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user that no process has locked, unless it is recent."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _YOUNG_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Create a folder for temporary files, and remove it at the end.

    Also removes older folders with this prefix whose processes have ended, in whatever way.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    with _held(folder):
        for left in list(folder.parent.glob(f"{prefix}*")):
            if left != folder:
                _remove_if_left(left)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
