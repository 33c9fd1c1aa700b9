"""Folders that are written in for a while: beside what they become, or in the temporary folder.

Their maker holds a lock on each, which the kernel lets go of however the process ends. So what a killed process left is
told from what is in use, also over containers that see each other's files and not each other's processes.
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
"""Names under which we write what is renamed later; those without 16 digits are of older versions."""
_YOUNG_SECONDS = 3600
"""A younger folder may be about to be locked."""


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Make a new folder beside ``target`` to write in, for `move_into`; what is left of it is removed.

    What a killed process left of one for the same target goes, too.
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
    """Lock a folder: who finds the lock free knows that the process which made it is gone, however it ended."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def move_into(staging: Path, target: Path) -> None:
    """Make ``target`` hold what was written into ``staging``: renamed whole, or file by file where it holds something.

    Of two processes that do so at once, one comes after the other: never are files of both mixed.

    Raises:
        SecurityError: if a folder in ``target`` is a link.
        OSError: if it cannot be written.
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
    """Remove what a killed process left half written in ``folder``: for who alone writes there (holds its lock)."""
    for left in list(folder.iterdir()) if folder.is_dir() else []:
        if _STAGING.fullmatch(left.name):
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of ours that no process holds, unless it is young."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _YOUNG_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Make a folder for temporary files, and remove it at the end.

    Those with this prefix whose processes are gone, however they ended, are removed as well.
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
