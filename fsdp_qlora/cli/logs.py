"""Prints what the library logs: information on stdout, warnings on stderr with our name in front."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsdp_qlora.errors import SecurityError
from fsdp_qlora.files.write import append_to
from fsdp_qlora.track.lines import to_line


class _Printed(logging.Handler):
    """Prints to the current `sys.stdout` and `sys.stderr`, which may have been replaced since the start."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        if record.levelno >= logging.WARNING:
            print(f"fsdp-qlora: {record.getMessage()}", file=sys.stderr, flush=True)
        else:
            print(record.getMessage(), flush=True)


def listen() -> None:
    """Print what `fsdp_qlora` logs from now on; used as a library, it leaves this to Python's `logging` settings."""
    logger = logging.getLogger("fsdp_qlora")
    if not any(isinstance(handler, _Printed) for handler in logger.handlers):
        logger.addHandler(_Printed())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _Kept(logging.Handler):
    """Appends warnings to a file, as JSON lines."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line; if the disk is full, the message has at least been printed."""
        with suppress(OSError, SecurityError), append_to(self._file) as stream:
            stream.write(to_line({"time": record.created, "message": record.getMessage()}).encode())


@contextmanager
def keeping(file: Path) -> Iterator[None]:
    """Also keep the warnings of `fsdp_qlora` in ``file``, for `fsdp-qlora watch` and the report."""
    logger, handler = logging.getLogger("fsdp_qlora"), _Kept(file)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
