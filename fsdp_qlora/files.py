"""Files on any file system: where it lacks an operation (locks, links, syncing folders), there is another way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

LACKING = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.ENOTTY)
"""What the kernel answers where a file system (FUSE, NFS, SMB, FAT) does not have an operation."""


def write_first(file: Path, text: str, link: Callable[[Path, Path], None] = os.link) -> bool:
    """Write a file whole, unless it is there; return whether it was written. Of several processes, one writes it."""
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    try:
        link(staging, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (*LACKING, errno.EPERM, errno.EMLINK):
            raise
        return _create(file, text)  # a reader may see half of it for a moment
    finally:
        staging.unlink()
    return True


def _create(file: Path, text: str) -> bool:
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    return True


def sync(path: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Have the kernel write a file or a folder's entries to the disk, where the file system can be asked to."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in (*LACKING, errno.EISDIR, errno.EACCES):
            return
        raise
    try:
        fsync(handle)
    except OSError as error:
        if error.errno not in LACKING:
            raise
    finally:
        os.close(handle)
