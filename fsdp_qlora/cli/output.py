"""What is printed never ends a run: wherever it goes, and however a name, a sample or an answer is spelt.

`withstand` is called once, before anything is printed, and puts streams in place of stdout and stderr that cannot fail.
Everything that prints, other people's libraries included, goes through these two.
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
"""Failures that may pass; after any other (a broken pipe, a terminal that is gone) nothing will be read any more."""


class _Steadfast(io.TextIOWrapper):
    """A text stream that drops what it cannot write."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BlockingIOError:  # another program that shares the terminal has set it so
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
        """Send what follows to nowhere, so that no later flush (the interpreter's last one) fails again."""
        if not (isinstance(error, OSError) and error.errno in _FOR_NOW) and not self.closed:
            _send_nowhere(self.fileno())


def withstand() -> None:
    """Make the output of this process unable to fail; call it first."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): the next file that is opened, a checkpoint maybe, would be written into
            _send_nowhere(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is None or type(old) is io.TextIOWrapper:  # else somebody's own, a notebook's or a test's
            setattr(sys, name, _steadfast(number, old))


def _steadfast(number: int, old: io.TextIOWrapper | None) -> _Steadfast:
    """Build a stream over the same descriptor; the old one stays open for those who hold it."""
    settings: dict[str, Any] = {"encoding": "utf-8"}
    if old is not None:
        try:
            old.flush()
        except (OSError, ValueError):
            _send_nowhere(number)
        settings = {
            "encoding": old.encoding, "line_buffering": old.line_buffering, "write_through": old.write_through,
        }  # fmt: skip
    buffering = 0 if old is not None and old.write_through else -1  # 0 where Python was started with -u
    below: Any = open(number, "wb", buffering, closefd=False)  # noqa: SIM115  (for as long as the process)
    return _Steadfast(below, errors="backslashreplace", **settings)


def _send_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)


def restart_in_utf8() -> None:
    """Start this very process anew where the locale is not UTF-8: files and names are, whatever the terminal shows.

    What is printed keeps the locale's encoding. Does not return where it starts the process anew.
    """
    encoding = locale.getencoding()
    if sys.flags.utf8_mode or codecs.lookup(encoding).name == "utf-8" or not sys.executable:
        return
    environment = {"PYTHONIOENCODING": f"{encoding}:backslashreplace", **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], environment)
