"""What the library logs, as the command line prints it: news on stdout, warnings on stderr with our name."""

from __future__ import annotations

import logging
import sys


class _Printed(logging.Handler):
    """Prints to the streams as they are at that moment: they may have been replaced since."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        if record.levelno >= logging.WARNING:
            print(f"fsdp-qlora: {record.getMessage()}", file=sys.stderr, flush=True)
        else:
            print(record.getMessage(), flush=True)


def listen() -> None:
    """Print from now on what `fsdp_qlora` logs; as a library it leaves that to Python's `logging` settings."""
    logger = logging.getLogger("fsdp_qlora")
    if not any(isinstance(handler, _Printed) for handler in logger.handlers):
        logger.addHandler(_Printed())
        logger.setLevel(logging.INFO)
        logger.propagate = False
