"""What is typed in a terminal, or comes through a pipe, line by line.

A rank that our launcher or torchrun started is in a session of its own, but its standard input is still the terminal:
reading it works, because it is not the terminal of that session. Lines are read from the descriptor, not through
`input`, which would print its prompt to a pipe and needs the terminal to be its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

_CHUNK = 65536
_PROMPT = "> "


def is_terminal() -> bool:
    """Whether somebody types."""
    return os.isatty(0)


def typed_lines() -> Iterator[str]:
    """Yield the lines of standard input without their ends, the last one also if it has none.

    Ctrl-C at the prompt ends them, as the end of the input does (Ctrl-D).
    """
    rest = b""
    while True:
        _prompt()
        while b"\n" not in rest:
            try:
                data = os.read(0, _CHUNK)
            except (KeyboardInterrupt, OSError):  # a terminal that was closed gives an error
                data = rest = b""
            if not data:
                if is_terminal():
                    print(file=sys.stderr)
                if rest:
                    yield _text(rest)
                return
            rest += data
        line, _, rest = rest.partition(b"\n")
        yield _text(line)


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").removesuffix("\r")


def _prompt() -> None:
    if is_terminal():
        print(_PROMPT, end="", file=sys.stderr, flush=True)
