"""Prints what the library logs: information on stdout, warnings on stderr with our name in front."""

from __future__ import annotations

import logging
import sys


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
