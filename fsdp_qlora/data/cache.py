"""Tokenized rows on disk, a folder for each key: whole or not there, and compared with its digests at each start.

::

    tokens/<key>/              the files, and SHA256SUMS with a line for each (as `sha256sum -c` reads it)
    tokens/making-<key>.*      what is being made, and the lock of the process that makes it

Who trains on a folder holds a lock on its SHA256SUMS, so that nobody removes it meanwhile.
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
"""What the cache may hold. Beyond that the folders that were not used for longest are removed."""
_RECENT_SECONDS = 3600.0
"""A folder that was used since then is kept in any case: its user may not hold it yet."""
_MAKING = "making-"


def obtain(folder: Path, load: Callable[[Path], object], make: Callable[[Path], None]) -> None:
    """See to it that ``folder`` is there and whole. It is made anew where a file does not match its digest.

    This reads the folder once. Of several processes that miss the same folder, one makes it and the others wait.

    Args:
        folder: ``tokens/<key>``.
        load: opens what is in the folder; whatever it raises means that the folder is not whole.
        make: writes the files into an empty folder.
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
                _log.warning("%s: %s. The data are tokenized anew.", folder, problem)
            _make(folder, make)
    _note_use(folder)
    sweep(folder.parent)
    prune(folder.parent)


def hold(folder: Path) -> BinaryIO:
    """Keep others from removing the folder while the returned file is open."""
    stream = (folder / SUMS).open("rb")
    try_lock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    return stream


def _problem(folder: Path, load: Callable[[Path], object]) -> str | None:
    """Return what is wrong with a folder; None where it is whole."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8") if (folder / SUMS).is_file() else ""
        lines = []
        for file in sorted(set(folder.iterdir()) - {folder / SUMS}):
            if not file.is_file():  # a link to nowhere, or a pipe, which would be waited for
                return f"{file.name} is not a file"
            lines.append(_line(file))
            if lines[-1] not in text:
                return f"{file.name} is not as it was written (its sha256 is not the one in {SUMS})"
        if text != "".join(lines):
            return f"{SUMS} is not as it was written"
        load(folder)
    except PermissionError:  # of another user, and not damaged
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        return typed_line(error)
    return None


def _line(file: Path) -> str:
    return f"{file_sha256(file)}  {file.name}\n"


def _note_use(folder: Path) -> None:
    with suppress(OSError):  # a cache of somebody else's, or on a file system without times
        os.utime(folder)


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    staging = folder.with_name(f"{_MAKING}{folder.name}.{secrets.token_hex(8)}")
    staging.mkdir()  # as the umask says, which mkdtemp does not ask
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
            os.rename(staging, folder)  # noqa: PTH104  (it must fail where another one is there)
        except OSError:  # where there are no locks, another process may have been first
            if not folder.is_dir():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _discard(folder: Path, aside: Path) -> None:
    """Rename a folder at once and remove it then: nobody finds half of it."""
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
    """Remove what processes that were killed have left, ``<prefix><name>.*``, where nobody holds the name's lock."""

    def stem(path: Path) -> str:
        return path.name[: len(prefix)] + path.name[len(prefix) :].partition(".")[0]

    for name in {stem(path) for path in root.glob(f"{prefix}*")}:
        with suppress(OSError), alone(_lock_of(root, name), wait=False) as held:
            for left in root.glob(f"{prefix}*") if held else ():
                if stem(left) == name and left != _lock_of(root, name):
                    remove(left)


def prune(root: Path, max_bytes: int = MAX_BYTES, recent_seconds: float = _RECENT_SECONDS) -> None:
    """Remove the folders that were not used for longest, where all together are larger than ``max_bytes``.

    Folders that are in use stay, and where the file system knows no locks all do.
    """
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(_MAKING)]
    room = max_bytes
    for folder in sorted(folders, key=_last_use, reverse=True):
        with suppress(OSError):  # removed by another process meanwhile, or somebody else's
            room -= sum(file.lstat().st_size for file in folder.iterdir())
            if room < 0 and time.time() - _last_use(folder) > recent_seconds:
                _remove_unused(folder)


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_unused(folder: Path) -> None:
    with (folder / SUMS).open("a") as stream:  # on NFS, to lock a file alone it must be open for writing
        if try_lock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            _discard(folder, folder.with_name(f"{_MAKING}{folder.name}.{os.getpid()}"))
