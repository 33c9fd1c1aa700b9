"""On-disk cache of tokenized rows: one folder per key, created atomically and verified against its digests on use.

::

    tokens/<key>/              the files, and SHA256SUMS with a line for each (as `sha256sum -c` reads it)
    tokens/making-<key>.*      folders under construction, and the lock of the process that builds them

A process that trains on a folder holds a lock on its SHA256SUMS, so that no other process removes it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fsdp_qlora.errors import StorageError, typed_line
from fsdp_qlora.files.locks import alone, try_lock
from fsdp_qlora.files.read import file_sha256
from fsdp_qlora.files.write import sync

_log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
MAX_BYTES = 64 * 2**30
"""Maximum size of the cache. Beyond it, the least recently used folders are removed."""
_RECENT_SECONDS = 3600.0
"""A folder used within this time is always kept: its user may not have locked it yet."""
_MAKING = "making-"


def obtain(folder: Path, load: Callable[[Path], object], make: Callable[[Path], None]) -> None:
    """Make sure that ``folder`` exists and is intact; rebuild it if a file does not match its digest.

    Verification reads the whole folder. If several processes need the same missing folder, one builds it and the others
    wait.

    Args:
        folder: ``tokens/<key>``.
        load: opens the folder; any exception except `PermissionError` means that the folder is damaged.
        make: writes the files into an empty folder.

    Raises:
        StorageError: if the cache cannot be read or written for lack of permission.
    """
    try:
        _obtain(folder, load, make)
    except PermissionError as error:
        raise StorageError(
            f"{error.filename or folder} cannot be read or written: {error.strerror}. Set FSDP_QLORA_CACHE to a folder "
            "of your own."
        ) from error


def _obtain(folder: Path, load: Callable[[Path], object], make: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if _problem(folder, load) is None:
        _note_use(folder)
        return
    with alone(_lock_of(folder.parent, f"{_MAKING}{folder.name}")):
        problem = _problem(folder, load)  # another process may have made it meanwhile
        if problem is not None:
            if os.path.lexists(folder):
                _log.warning("%s: %s. Tokenizing the data again.", folder, problem)
            _make(folder, make)
    _note_use(folder)
    sweep(folder.parent)
    prune(folder.parent)


def hold(folder: Path) -> BinaryIO:
    """Protect the folder from removal by other processes while the returned file is open."""
    stream = (folder / SUMS).open("rb")
    try_lock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    return stream


def _problem(folder: Path, load: Callable[[Path], object]) -> str | None:
    """Return what is wrong with a folder, or None if it is intact."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8") if (folder / SUMS).is_file() else ""
        lines = []
        for file in sorted(set(folder.iterdir()) - {folder / SUMS}):
            if not file.is_file():  # a dangling link, or a pipe, on which reading would block
                return f"{file.name} is not a file"
            lines.append(_line(file))
            if lines[-1] not in text:
                return f"{file.name} has changed since it was written (its sha256 does not match {SUMS})"
        if text != "".join(lines):
            return f"{SUMS} has changed since it was written"
        load(folder)
    except PermissionError:  # belongs to another user, but is not damaged
        raise
    except Exception as error:  # a damaged file can make its reader raise anything
        return typed_line(error)
    return None


def _line(file: Path) -> str:
    return f"{file_sha256(file)}  {file.name}\n"


def _note_use(folder: Path) -> None:
    with suppress(OSError):  # somebody else's cache, or a file system without timestamps
        os.utime(folder)


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    staging = folder.with_name(f"{_MAKING}{folder.name}.{secrets.token_hex(8)}")
    staging.mkdir()  # follows the umask, unlike mkdtemp
    try:
        make(staging)
        lines = []
        for file in sorted(staging.iterdir()):
            sync(file)
            lines.append(_line(file))
        (staging / SUMS).write_text("".join(lines), encoding="utf-8")
        sync(staging / SUMS)
        sync(staging)
        if os.path.lexists(folder):
            _discard(folder, Path(f"{staging}.old"))
        try:
            os.rename(staging, folder)  # noqa: PTH104  (must fail if a non-empty folder exists)
        except OSError:  # without file locks, another process may have been first
            if not folder.is_dir():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _discard(folder: Path, aside: Path) -> None:
    """Remove a folder, renaming it first so that no process sees it partly deleted."""
    folder.rename(aside)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock_of(root: Path, stem: str) -> Path:
    return root / f"{stem}.lock"


def sweep(root: Path, prefix: str = _MAKING) -> None:
    """Remove leftovers of killed processes, ``<prefix><name>.*``, if no process holds the lock of that name."""

    def stem(path: Path) -> str:
        return path.name[: len(prefix)] + path.name[len(prefix) :].partition(".")[0]

    for name in {stem(path) for path in root.glob(f"{prefix}*")}:
        with suppress(OSError), alone(_lock_of(root, name), wait=False) as held:
            for left in root.glob(f"{prefix}*") if held else ():
                if stem(left) == name and left != _lock_of(root, name):
                    remove(left)


def prune(root: Path, max_bytes: int = MAX_BYTES, recent_seconds: float = _RECENT_SECONDS) -> None:
    """Remove the least recently used folders if all together exceed ``max_bytes``.

    Folders in use are kept; if the file system does not support locks, all are.
    """
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(_MAKING)]
    room = max_bytes
    for folder in sorted(folders, key=_last_use, reverse=True):
        with suppress(OSError):  # removed by another process meanwhile, or owned by another user
            room -= sum(file.lstat().st_size for file in folder.iterdir())
            if room < 0 and time.time() - _last_use(folder) > recent_seconds:
                _remove_unused(folder)


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_unused(folder: Path) -> None:
    with (folder / SUMS).open("a") as stream:  # on NFS, an exclusive lock requires a file open for writing
        if try_lock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            _discard(folder, folder.with_name(f"{_MAKING}{folder.name}.{os.getpid()}"))
