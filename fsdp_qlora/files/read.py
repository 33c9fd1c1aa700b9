"""Safe file access on any file system; missing operations (locks, links, syncing folders) have a fallback.

Two guarantees:

*Files that others may have written* are read with `read_regular` and `read_json`: only regular files, opened without
following a link or blocking on a pipe, of limited size; JSON must have exactly the requested types.

*Files that we write* are written with `replacing` and the functions built on it (`fsdp_qlora.files.write`): to a
temporary file in the same folder, under a name nobody can guess and plant a link at, then synced and renamed. A link at
the destination is replaced, not followed. Modes follow the umask.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import SecurityError

_log = logging.getLogger(__name__)

LACKING = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.ENOTTY)
"""Errors from the kernel if a file system (FUSE, NFS, SMB, FAT) does not support an operation."""
JSON_BYTES = 50_000_000
"""Larger than any legitimate manifest or config."""
_MAX_DEPTH = 64
_MAX_NUMBER = 2**63


def open_regular(file: Path, flags: int = os.O_RDONLY, changes: bool = True) -> int:
    """Open a regular file (or create one, depending on ``flags``) and return its descriptor; links are not followed.

    Args:
        file: the file.
        flags: as for `os.open`.
        changes: whether a file opened for writing is really written to, rather than only locked.

    Raises:
        SecurityError: if it is a link, folder, pipe or device, or would be written to and has a second hard link.
        OSError: if it cannot be opened.
    """
    try:
        # O_NONBLOCK: otherwise opening a pipe blocks until another process opens its other end
        handle = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if file.is_symlink():
            raise SecurityError(f"{file} is a link; links are not followed here. Put the file itself there.") from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise SecurityError(f"{file} is not a regular file.") from error
        raise
    status = os.fstat(handle)
    written = changes and flags & (os.O_WRONLY | os.O_RDWR)
    if stat.S_ISREG(status.st_mode) and not (written and status.st_nlink > 1):
        return handle
    os.close(handle)
    what = "has a second name elsewhere (a hard link)" if stat.S_ISREG(status.st_mode) else "is not a regular file"
    raise SecurityError(f"{file} {what}; remove it.")


def read_regular(file: Path, limit: int | None = JSON_BYTES) -> bytes:
    """Return the content of a file that others may have written.

    Raises:
        SecurityError: if it is not a regular file, or larger than ``limit`` bytes.
        OSError: if it cannot be read.
    """
    with os.fdopen(open_regular(file), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if limit is not None and size > limit:
            raise SecurityError(f"{file} has {size} bytes, more than the limit of {limit}.")
        return stream.read(size)


def file_sha256(file: Path, follow: bool = True) -> str:
    """Return the sha256 of a file in hexadecimal; set ``follow`` to False for files that others may have put there."""
    with file.open("rb") if follow else os.fdopen(open_regular(file), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def read_json(file: Path, kind: Any = Any, limit: int = JSON_BYTES) -> Any:
    """Read JSON from a file that others may have written; see `read_regular` and `parse_json`."""
    return parse_json(read_regular(file, limit), kind)


def parse_json(data: bytes, kind: Any = Any) -> Any:
    """Parse ``data`` as JSON of the type ``kind`` (such as ``dict[str, list[int]]``; ``Any`` accepts everything).

    Raises:
        ValueError: if it is not UTF-8 or not JSON, has a duplicate key, is nested too deeply, or has another type.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unequal_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    layer = [value]
    for _ in range(_MAX_DEPTH):
        layer = [inner for item in layer if isinstance(item, dict | list) for inner in _items(item)]
    if layer:  # writing it out again would recurse as deeply
        raise ValueError("it is nested too deeply")
    if (wrong := misfit(value, kind)) is not None:
        raise ValueError(wrong)
    return value


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _unequal_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it has a duplicate key")
    return values


def misfit(value: Any, kind: Any, name: str = "it") -> str | None:
    """Describe how a JSON value differs from the type ``kind``, or return None; integers may have up to 63 bits."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return None
    if origin in (types.UnionType, typing.Union):
        misfits = [misfit(value, inner, name) for inner in args]
        return None if None in misfits else misfits[0]
    if origin is dict and isinstance(value, dict):
        return next((wrong for k, v in value.items() if (wrong := misfit(v, args[1], f"{name}[{k[:80]!r}]"))), None)
    if origin is list and isinstance(value, list):
        return next((wrong for n, v in enumerate(value) if (wrong := misfit(v, args[0], f"{name}[{n}]"))), None)
    if kind in (int, float) and type(value) is int:
        fits = abs(value) < _MAX_NUMBER
    else:
        fits = origin is None and isinstance(value, kind)
    fits = fits and not (kind is int and isinstance(value, bool))
    return None if fits else f"{name} is {json.dumps(value)[:80]}, not {getattr(kind, '__name__', kind)}"


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield everything below a folder at any depth, without following links; iterative, so depth is unlimited."""
    left = [str(folder)]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)


def refuse_irregular(folder: Path, may_link: bool = False, apart: str | None = None) -> None:
    """Check that a folder contains only files and folders, at any depth.

    Args:
        folder: the folder; its own path may contain links.
        may_link: whether it may also contain links to targets inside it.
        apart: name of a subfolder that we never write to; its content is not checked.

    Raises:
        SecurityError: naming the first link, pipe or device found.
    """
    home = _real(folder)
    for entry in walk(folder):
        path = Path(entry.path)
        if apart is not None and folder / apart in path.parents and not (folder / apart).is_symlink():
            continue
        if entry.is_symlink():
            if may_link and _real(path).is_relative_to(home):
                continue
            raise SecurityError(f"{path} is a link; links are not followed here. Put the file itself there.")
        if not (entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)):
            raise SecurityError(f"{entry.path} is neither a file nor a folder; remove it.")


def own_file(folder: Path, name: str) -> Path:
    """Return the real path of a file in a model or adapter folder, whether or not it exists.

    In the hub's cache, files are links to the blobs of the same model. A link to anywhere else is refused: its target
    would be read, and published, as part of the model.

    Raises:
        SecurityError: if the file is such a link.
    """
    home, real = _real(folder), _real(folder / name)
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    if not real.is_relative_to(home):
        raise SecurityError(
            f"{folder / name} is a link that points outside {home}. If it is yours, replace it with a copy."
        )
    return real


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on circular links


def who_else_changes(path: Path) -> str | None:
    """Say who other than this user and root can change a path, judging by owner and mode; None if nobody can."""
    status = path.lstat()
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user (uid {status.st_uid})"
    if status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode):
        return f"everybody can write to {path} (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def warn_of_others(*paths: Path) -> None:
    """Warn about the first path that somebody else can change, if any."""
    for path in paths:
        if (why := who_else_changes(path)) is not None:
            _log.warning("%s: its contents may not be what was written.", why)
            return
