"""Files at URLs: http and https through httpx (a dependency of `huggingface_hub`), everything else through fsspec."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from fsdp_qlora.data.lines import CHUNK
from fsdp_qlora.errors import DataError, typed_line
from fsdp_qlora.shown import shown_source

if TYPE_CHECKING:
    import httpx

_WAIT_SECONDS = 60.0
"""Timeout for a response, and between two chunks of it."""
_MARKS = ("etag", "last-modified", "content-length")


def path_of(name: str) -> str:
    """Return the part of a name whose suffix gives the kind of file: a URL without query and fragment."""
    is_local = "://" not in name or name.startswith(("file://", "local://"))
    return name if is_local else name.partition("#")[0].partition("?")[0]


def is_http(name: str) -> bool:
    """Whether a name is an http or https URL."""
    return name.startswith(("http://", "https://"))


@contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """Open a file or URL for sequential reading, decompressed.

    Raises:
        DataError: if a web server does not deliver the file.
    """
    import fsspec
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    compression = infer_compression(path_of(name))
    if not is_http(name):
        with cast(Any, fsspec.open(name, "rb", compression=compression)) as stream:
            # Neither zstd's nor a remote file's own readline supports a limit.
            yield io.BufferedReader(stream, CHUNK)
        return
    with _answer(name) as answer, io.BufferedReader(_Body(answer), CHUNK) as body:
        yield body if compression is None else io.BufferedReader(cast(Any, compr)[compression](body, mode="rb"), CHUNK)


@contextmanager
def seekable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """Yield a seekable stream: the stream itself, or else a copy in a temporary file."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, CHUNK)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def stamp(name: str) -> str:
    """Return a string that changes with the content of a URL, as far as its server tells.

    Raises:
        DataError: if the URL cannot be read.
    """
    if is_http(name):
        with _answer(name) as answer:
            marks = [f"{mark}={answer.headers[mark]}" for mark in _MARKS if mark in answer.headers]
        return " ".join(marks if "etag" in answer.headers else [*marks, urlsplit(name).query])
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(name)
        return str(fs.ukey(path))
    except Exception as error:  # each storage has its own exceptions
        raise DataError(f"data: {shown_source(name)} cannot be read: {typed_line(error)}") from error


@contextmanager
def _answer(name: str) -> Iterator[httpx.Response]:
    import httpx

    shown = shown_source(name)
    try:
        with httpx.stream(
            "GET", name, follow_redirects=True, timeout=_WAIT_SECONDS, auth=_from_netrc(),
            headers={"Accept-Encoding": "identity"},
        ) as answer:  # fmt: skip
            if answer.status_code != httpx.codes.OK:
                raise DataError(f"data: {shown} cannot be read: the server answered {answer.status_code}.")
            yield answer
    except (httpx.HTTPError, httpx.InvalidURL) as error:  # only its type: the text may contain the query
        raise DataError(f"data: {shown} cannot be read: {type(error).__name__}.") from error


def _from_netrc() -> httpx.NetRCAuth | None:
    import httpx

    file = Path(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    return httpx.NetRCAuth(str(file)) if file.is_file() else None


class _Body(io.RawIOBase):
    """A response body as a file. If it ends early, httpx raises, so it is never mistaken for a short file."""

    def __init__(self, answer: httpx.Response) -> None:
        self._pieces, self._left = answer.iter_bytes(CHUNK), memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; 0 at the end."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
