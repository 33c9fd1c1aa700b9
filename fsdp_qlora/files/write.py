"""Atomic writes: links are not followed, and a file is synced to disk before it is renamed into place."""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fsdp_qlora.files.read import LACKING, open_regular, read_regular


def staging_for(target: Path) -> Path:
    """Return an unguessable temporary name in the folder of ``target``."""
    return target.with_name(f".{target.name[:60]}.{secrets.token_hex(8)}.part")


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Yield a stream that replaces ``file`` atomically: even after a kill, readers see the old or the new file whole.

    Raises:
        OSError: naming ``file``, if it cannot be written; the file is then unchanged.
    """
    staging = staging_for(file)
    try:
        with os.fdopen(open_regular(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as stream:
            yield stream
            stream.flush()
            _sync_handle(stream.fileno(), os.fsync)
        staging.replace(file)
    except BaseException as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(staging)):
            error.filename, error.filename2 = str(file), None
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file with `replacing`."""
    with replacing(file) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def write_json(file: Path, value: Any) -> None:
    """Write JSON with `replacing`."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def copy_regular(source: Path, file: Path) -> None:
    """Copy a file that others may have written, following links on neither side."""
    with os.fdopen(open_regular(source), "rb") as stream, replacing(file) as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)


def append_to(file: Path) -> io.FileIO:
    """Open one of our files for appending, or create it; links are not followed.

    The stream is unbuffered: a write may be partial, but closing the stream cannot retry, and fail on, a write that
    already failed. If the file has a second hard link (a backup, for example), it is copied first, so that the other
    name keeps the old content.
    """
    if file.is_file() and not file.is_symlink() and file.stat().st_nlink > 1:
        content = read_regular(file, None)
        with replacing(file) as stream:
            stream.write(content)
    return io.FileIO(open_regular(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def write_first(file: Path, text: str, link: Callable[[Path, Path], None] = os.link) -> bool:
    """Write a file atomically unless it exists; return whether it was written. Among racing processes one writes it."""
    staging = staging_for(file)
    try:
        _create(staging, text)
        link(staging, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (*LACKING, errno.EPERM, errno.EMLINK):
            raise
        try:
            _create(file, text)  # not atomic: a reader may briefly see part of it
        except FileExistsError:
            return False
    finally:
        staging.unlink(missing_ok=True)
    return True


def _create(file: Path, text: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def sync(path: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Sync a file or a folder's entries to disk, if the file system supports it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in (*LACKING, errno.EISDIR, errno.EACCES):
            return
        raise
    try:
        _sync_handle(handle, fsync)
    finally:
        os.close(handle)


def _sync_handle(handle: int, fsync: Callable[[int], None]) -> None:
    try:
        fsync(handle)
    except OSError as error:
        if error.errno not in LACKING:
            raise


def open_as_a_new_file(file: Path) -> None:
    """Give ``file`` the mode of a newly created file; safetensors creates 0600, whatever the umask.

    Does nothing if the file system has no modes. The mode is taken from a sample file, because the umask can only be
    read by setting it, for all threads.
    """
    with suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent, prefix=".mode-") as folder:
        sample = Path(folder) / "new"
        sample.touch()
        file.chmod(sample.stat().st_mode & 0o777)
