"""Makes sure that printing never ends a run, wherever the output goes and whatever characters a text contains.

`withstand` is called once, before anything is printed, and replaces stdout and stderr by streams that cannot fail.
All output, including that of other libraries, goes through these two.
"""

from __future__ import annotations

import codecs
import errno
import io
import locale
import os
import sys
from typing import Any

_FOR_NOW = (errno.ENOSPC, errno.EDQUOT)
"""Failures that may pass; after any other (a broken pipe, a closed terminal), nobody reads the stream any more."""


class _Steadfast(io.TextIOWrapper):
    """A text stream that drops what it cannot write."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BlockingIOError:  # another program on the terminal made it non-blocking
            os.set_blocking(self.fileno(), True)
            return len(text)
        except (OSError, ValueError) as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Send later output to /dev/null, so that no later flush fails again, such as the interpreter's last one."""
        if not (isinstance(error, OSError) and error.errno in _FOR_NOW) and not self.closed:
            _send_nowhere(self.fileno())


def withstand() -> None:
    """Make this process's output unable to fail; call it before anything else."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): the next opened file, perhaps a checkpoint, would get this number
            _send_nowhere(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is None or type(old) is io.TextIOWrapper:  # else it is a notebook's or a test's own stream
            setattr(sys, name, _steadfast(number, old))


def _steadfast(number: int, old: io.TextIOWrapper | None) -> _Steadfast:
    """Build a stream over the same descriptor; the old one stays open for code that holds it."""
    settings: dict[str, Any] = {"encoding": "utf-8"}
    if old is not None:
        try:
            old.flush()
        except (OSError, ValueError):
            _send_nowhere(number)
        settings = {
            "encoding": old.encoding, "line_buffering": old.line_buffering, "write_through": old.write_through,
        }  # fmt: skip
    buffering = 0 if old is not None and old.write_through else -1  # 0 if Python was started with -u
    below: Any = open(number, "wb", buffering, closefd=False)  # noqa: SIM115  (for as long as the process)
    return _Steadfast(below, errors="backslashreplace", **settings)


def _send_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)


def restart_in_utf8() -> None:
    """Restart this process in UTF-8 mode if the locale is not UTF-8, since files and file names are in UTF-8.

    Printed text keeps the locale's encoding. Does not return if it restarts the process.
    """
    encoding = locale.getencoding()
    if sys.flags.utf8_mode or codecs.lookup(encoding).name == "utf-8" or not sys.executable:
        return
    environment = {"PYTHONIOENCODING": f"{encoding}:backslashreplace", **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], environment)
