"""Files that we write: no link is followed, each appears whole, and is on the disk before it has its name."""

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
    """Return a name beside ``target`` that nobody can know before."""
    return target.with_name(f".{target.name[:60]}.{secrets.token_hex(8)}.part")


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Give a stream to write ``file`` with: a reader, or a run after a kill, sees the old one or the new one whole.

    Raises:
        OSError: naming ``file``, if it cannot be written; it is then as it was.
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
    """Write a file by `replacing`."""
    with replacing(file) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def write_json(file: Path, value: Any) -> None:
    """Write JSON by `replacing`."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def copy_regular(source: Path, file: Path) -> None:
    """Copy a file that others may have written; links are followed on neither side."""
    with os.fdopen(open_regular(source), "rb") as stream, replacing(file) as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)


def append_to(file: Path) -> io.FileIO:
    """Open a file of ours to append to, or make it; a link is not followed. A write may take a part: it is unbuffered.

    So nothing of a write that failed is left to be written, and fail again, when it is closed. A file that has a second
    name elsewhere (a backup of hard links) keeps its content there and is a file of its own here.
    """
    if file.is_file() and not file.is_symlink() and file.stat().st_nlink > 1:
        content = read_regular(file, None)
        with replacing(file) as stream:
            stream.write(content)
    return io.FileIO(open_regular(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def write_first(file: Path, text: str, link: Callable[[Path, Path], None] = os.link) -> bool:
    """Write a file whole, unless it is there; return whether it was written. Of several processes, one writes it."""
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
            _create(file, text)  # a reader may see half of it for a moment
        except FileExistsError:
            return False
    finally:
        staging.unlink(missing_ok=True)
    return True


def _create(file: Path, text: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def sync(path: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Have the kernel write a file or a folder's entries to the disk, where the file system can be asked to."""
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
    """Give ``file`` the mode of a new one beside it; safetensors leaves 0600, whatever the umask.

    Nothing happens where the file system knows no modes. (The umask itself can only be read by setting it, for all
    threads.)
    """
    with suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent, prefix=".mode-") as folder:
        sample = Path(folder) / "new"
        sample.touch()
        file.chmod(sample.stat().st_mode & 0o777)
