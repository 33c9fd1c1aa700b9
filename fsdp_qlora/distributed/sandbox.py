"""Runs untrusted code (a chat template) in a process of its own, which can be killed whatever it does.

Within this process nothing could interrupt ``2 ** 10 ** 10`` or bound the memory of ``'a' * 10 ** 10``; jinja's sandbox
restricts access to objects but neither time nor memory. The process is forked because it needs this process's state,
and reused because forking a large process is slow. Items are sent with `marshal`, which preserves all plain types; a
list that contains other objects (dates) is passed by forking anew.
"""

from __future__ import annotations

import marshal
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fsdp_qlora.distributed.parent import die_with_parent

SECONDS = 120.0
"""Time limit for one item."""
MORE_BYTES = 4 * 2**30
"""Memory that the process may use on top of what it has when forked."""
_RESULT, _BUG = b"r", b"b"


class StuckError(Exception):
    """An item took too long or killed its process; ``number`` is its index."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


class _GoneError(StuckError):
    """The process has exited."""


class Apart:
    """Runs ``work`` on items in a forked process; beyond the memory limit it gets a `MemoryError`."""

    def __init__(self, work: Callable[[Any], bytes], seconds: float = SECONDS, more_bytes: int = MORE_BYTES) -> None:
        self._work, self._seconds, self._more_bytes = work, seconds, more_bytes
        self._lock = threading.Lock()
        self._child: tuple[int, int, Connection] | None = None
        """Process id, parent's process id (a fork of the parent does not own the child), and our end of the pipe."""

    def results(self, items: list[Any]) -> list[bytes]:
        """Return what ``work`` returns for each item.

        Raises:
            StuckError: if an item exceeds the time limit, or its process dies.
            RuntimeError: if ``work`` raises, with its traceback.
        """
        with self._lock:
            try:
                while True:
                    pipe, is_new = self._give(items)
                    try:
                        return [self._receive(pipe, number) for number in range(len(items))]
                    except _GoneError as error:  # it also dies with the thread that forked it: retry in a new one
                        self.close()
                        if is_new:
                            raise StuckError(error.number, str(error)) from None
            except BaseException:
                self.close()
                raise

    def _give(self, items: list[Any]) -> tuple[Connection, bool]:
        """Start the child on ``items``; fork a new one if there is none or the items cannot be sent."""
        try:
            sent = marshal.dumps(items)
        except ValueError:
            sent = None
        if sent is not None and self._child is not None and self._child[1] == os.getpid():
            try:
                self._child[2].send_bytes(sent)
                return self._child[2], False
            except OSError:  # the child has exited
                pass
        self.close()
        self._child = self._start(items)
        return self._child[2], True

    def _receive(self, pipe: Connection, number: int) -> bytes:
        if not pipe.poll(self._seconds):
            raise StuckError(number, f"took longer than {self._seconds:.0f} s")
        try:
            said = pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise _GoneError(number, "terminated the process it ran in") from None
        if said.startswith(_BUG):
            raise RuntimeError(said[1:].decode(errors="replace"))
        return said[1:]

    def _start(self, items: list[Any]) -> tuple[int, int, Connection]:
        ours, theirs = Pipe()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _serve(self._work, items, theirs, parent, self._more_bytes)
        theirs.close()
        return child, parent, ours

    def close(self) -> None:
        """Kill the process."""
        if self._child is not None:
            child, parent, pipe = self._child
            self._child = None
            pipe.close()
            if parent == os.getpid():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _serve(work: Callable[[Any], bytes], items: list[Any], pipe: Connection, parent: int, more_bytes: int) -> None:
    """Run as the child, and exit without the parent's exit handlers."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the parent decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent(parent)
        os.closerange(3, pipe.fileno())  # locks and sockets belong to the parent
        os.closerange(pipe.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        _limit_memory(more_bytes)
        while True:
            for item in items:
                pipe.send_bytes(_RESULT + work(item))
            items = marshal.loads(pipe.recv_bytes())
    except EOFError:
        pass
    except BaseException:
        pipe.send_bytes(_BUG + traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(0)


def _limit_memory(more_bytes: int) -> None:
    statm = Path("/proc/self/statm")
    if not statm.is_file():  # not Linux
        return
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
