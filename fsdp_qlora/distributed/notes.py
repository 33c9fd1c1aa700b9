"""A board for notes between ranks, outside any collective: files on one machine, a TCPStore across several."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch.distributed as dist

from fsdp_qlora.distributed.meeting import meeting_folder
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.patience import Patience
from fsdp_qlora.distributed.reduce import gather_json

_T = TypeVar("_T")
STORE_SECONDS = 5.0
"""How long to wait for the store. Its own timeout does not apply while the serving process is stopped."""


class Board(Protocol):
    """Named notes. Neither method waits for another rank to act."""

    def write(self, name: str, note: str) -> None:
        """Write a note, replacing any previous one of this name.

        Raises:
            TimeoutError: if the board does not answer.
        """
        ...

    def read(self, name: str) -> str | None:
        """Return a note, or None if there is none yet.

        Raises:
            TimeoutError: if the board does not answer.
        """
        ...


class FileBoard:
    """Notes as files in a folder shared by all ranks; they stay readable after their writer has died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, note: str) -> None:
        """See `Board`."""
        beside = self._folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        beside.write_text(note, encoding="utf-8")
        beside.replace(self._folder / name)

    def read(self, name: str) -> str | None:
        """See `Board`."""
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


class StoreBoard:
    """Notes in a TCPStore on rank 0, queried from a separate thread because a stopped server never answers."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._patience = Patience(STORE_SECONDS, "rank 0")

    def write(self, name: str, note: str) -> None:
        """See `Board`."""
        self._ask(lambda: self._store.set(name, note))

    def read(self, name: str) -> str | None:
        """See `Board`."""
        return self._ask(lambda: self._store.get(name).decode() if self._store.check([name]) else None)

    def _ask(self, question: Callable[[], _T]) -> _T:
        try:
            return self._patience.ask(question)
        except RuntimeError as error:  # raised by torch if the serving process is gone
            raise TimeoutError("rank 0 does not answer") from error


def open_board(ranks: Ranks) -> Board:
    """Open a board. This is a collective: every rank must call it."""
    if (folder := meeting_folder()) is not None:
        mine = tempfile.mkdtemp(prefix="board-", dir=folder) if ranks.is_main else ""
        return FileBoard(Path(gather_json(mine, ranks)[0]))
    store_class = cast(Any, dist).TCPStore  # public, although type checkers do not see the export
    host, timeout = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=STORE_SECONDS)
    if ranks.is_main:
        store = store_class(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        gather_json(store.port, ranks)
        return StoreBoard(store)
    port = gather_json(0, ranks)[0]
    return StoreBoard(store_class(host, port, is_master=False, wait_for_workers=False, timeout=timeout))
