"""A thread beside each rank: it ends the rank when another one has failed, and says who holds up the others.

A rank whose main thread waits in a collective runs no signal handler and raises nothing until the collective's own
timeout, which with NCCL is an abort without a word. This thread goes on: it puts the rank's phase on a board that all
ranks can read (a TCPStore on rank 0), and when this rank has been waiting for too long it looks who never came.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from fsdp_qlora.dist.mesh import Ranks
from fsdp_qlora.dist.reduce import gather_json

_INTERVAL_SECONDS = 0.5
_GRACE_SECONDS = 3.0
_BOARD_TIMEOUT = timedelta(seconds=5)
_SHARE_OF_TIMEOUT = 0.8
"""Share of the collectives' timeout after which a waiting rank speaks: before they give up."""


@dataclass
class Phases:
    """What this rank is doing: set by the main thread, the same sequence on every rank."""

    number: int = 0
    name: str = "start"
    since: float = field(default_factory=time.monotonic)

    def enter(self, name: str) -> None:
        """Begin the next phase."""
        self.number, self.name, self.since = self.number + 1, name, time.monotonic()


class Watch:
    """The thread, from `start` until `stop`."""

    def __init__(self, ranks: Ranks, phases: Phases, timeout_seconds: float) -> None:
        """Open the board. A collective: every rank calls it."""
        self._rank, self._size, self._phases = ranks.rank, ranks.size, phases
        self._limit = timeout_seconds * _SHARE_OF_TIMEOUT
        self._stop = threading.Event()
        self._board: Any = None
        self._shown = -1
        if ranks.size > 1:
            self._board = open_board(ranks)

    def start(self, failed_elsewhere: Callable[[], bool], hung: Callable[[str], None]) -> None:
        """Start watching.

        Args:
            failed_elsewhere: whether another rank has ended the run; this process then leaves with code 1.
            hung: takes the message when this rank waits for another one that does not come; the process then leaves.
        """

        def watch() -> None:
            while not self._stop.wait(_INTERVAL_SECONDS):
                if failed_elsewhere():
                    time.sleep(_GRACE_SECONDS)  # a rank that sees the failure itself ends by its own means
                    if not self._stop.is_set():
                        os._exit(1)
                elif (message := self._late()) is not None and not self._stop.is_set():
                    hung(message)
                    os._exit(1)

        threading.Thread(target=watch, name="watch-other-ranks", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()

    def _late(self) -> str | None:
        """Show where this rank is; return who is missing if it has waited there for too long."""
        if self._board is None:
            return None
        number, name, waited = self._phases.number, self._phases.name, time.monotonic() - self._phases.since
        try:
            if number != self._shown:
                self._board.set(str(self._rank), json.dumps([number, name, time.time()]))
                self._shown = number
            if waited < self._limit:
                return None
            others = [
                (rank, *json.loads(self._board.get(str(rank)))) for rank in range(self._size) if rank != self._rank
            ]
        except (RuntimeError, ValueError):  # rank 0, which holds the board, is gone or stands still
            if waited < self._limit:
                return None
            return f"rank {self._rank} waits in {name!r} for {waited:.0f} s, and rank 0 does not answer."
        missing = [
            f"rank {rank} never reached {name!r} (last seen entering {theirs!r} {time.time() - when:.0f} s ago)"
            for rank, count, theirs, when in others
            if count < number
        ]
        return f"{'; '.join(missing)}; the other ranks waited {waited:.0f} s." if missing else None


def open_board(ranks: Ranks) -> Any:
    """Open a TCPStore on rank 0, apart from the process group's own. A collective: every rank calls it."""
    store_class = cast(Any, dist).TCPStore  # public, though the type checker does not see it exported
    host = os.environ.get("MASTER_ADDR", "localhost")
    if ranks.is_main:
        board = store_class(host, 0, is_master=True, wait_for_workers=False, timeout=_BOARD_TIMEOUT)
        gather_json(board.port, ranks)
        return board
    port = gather_json(0, ranks)[0]
    return store_class(host, port, is_master=False, wait_for_workers=False, timeout=_BOARD_TIMEOUT)
