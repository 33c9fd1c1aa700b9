"""Files that rows name, images and recordings: where they lie, what they hold, and when they have changed."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fsdp_qlora.data.lines import Row
from fsdp_qlora.errors import DataError

T = TypeVar("T")
LARGEST = 256 * 2**20
"""Bytes of a file that is read."""
_EDGE = 2**16
"""Bytes at each end of a file that tell it from others of its size."""


def stamp_of(file: Path) -> bytes:
    """Return a digest of a file's size and of its first and last 64 KiB; for a missing file, of nothing.

    A file that is changed changes there: most are no longer, and compressed ones end with a checksum, or elsewhere.
    It does not depend on when the file was written, so that a copy of the data is the same data.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            edges = [stream.read(_EDGE)]
            stream.seek(max(_EDGE, size - _EDGE))
            edges.append(stream.read(_EDGE))
    except OSError:
        return b""
    return hashlib.blake2b(b"\0".join([str(size).encode(), *edges]), digest_size=16).digest()


def stamp_of_named(rows: Iterable[Row], named: Callable[[Row], Sequence[str]]) -> str:
    """Return a digest of the files that rows name, and of their names (`stamp_of`).

    Args:
        rows: the rows.
        named: returns the paths in a row, from the row's folder.
    """
    digest = hashlib.sha256()
    for row in rows:
        try:
            names = named(row)
        except DataError:
            names = [""]  # a bad row, which encoding it names
        for name in names:
            digest.update(f"{name}\0".encode("utf-8", "surrogatepass") + stamp_of(Path(row.folder, name)))
    return digest.hexdigest()


def each_checked(files: Sequence[Path], what: str, check: Callable[[Path, bytes], T]) -> list[T | DataError]:
    """Read files that rows call ``what`` on all cores; return what ``check`` makes of each, or what is wrong."""

    def attempt(file: Path) -> T | DataError:
        try:
            return check(file, content_of(file, what))
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(attempt, files))


def content_digest(content: bytes) -> bytes:
    """Return a digest of a whole file: 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def content_of(file: Path, what: str) -> bytes:
    """Return the bytes of a file that a row calls ``what`` (``image``).

    Raises:
        DataError: if it is missing, no regular file, too large or unreadable.
    """
    if not file.exists():
        raise DataError(f"there is no {what} {file}")
    if not file.is_file():
        raise DataError(f"the {what} {file} is no regular file")
    try:
        if (size := file.stat().st_size) > LARGEST:
            raise DataError(f"the {what} {file} has {size} bytes, and at most {LARGEST} are read")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"the {what} {file} cannot be read: {error.strerror}") from error
