"""A watchdog thread on each rank: exits when another rank has ended the run, and reports who holds up the others.

A rank whose main thread waits in a collective runs no signal handlers and raises nothing until the collective times
out, which with NCCL aborts silently; and a call into hung storage never returns at all. This thread keeps running: it
posts what the rank is doing and a heartbeat on a board that all ranks can read. If this rank makes no progress in its
own work for too long, the thread says so; if the rank has waited for too long, the thread looks for ranks that never
arrived, and for ranks that arrived but have stopped sending heartbeats.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.notes import STORE_SECONDS, Board, open_board
from fsdp_qlora.distributed.patience import Patience, Since
from fsdp_qlora.distributed.phases import AT_REST
from fsdp_qlora.errors import FsdpQloraError, StorageError

_INTERVAL_SECONDS = 0.5
_BEAT_SECONDS = 1.0
"""Interval between a rank's heartbeats."""
_GRACE_SECONDS = 3.0
_SHARE_OF_TIMEOUT = 0.8
"""Share of the collectives' timeout after which a waiting rank reports: before the collectives time out."""
_SHARE_ALONE = 0.7
"""Share after which a rank reports that its own work is stuck: before the ranks that wait for it report."""
_SILENT_SHARE = 0.25
"""Share of a waiting rank's limit after which a rank without heartbeats counts as stuck."""
_SILENT_BEATS = 5
"""But never sooner than after so many missed heartbeats."""
_TELL_SECONDS = 10.0
"""Interval at which rank 0 records what all ranks are doing, for people who look on."""
_MOST_TOLD = 256
"""Ranks that are recorded; asking for more would keep rank 0's board busy."""
_ANSWER_SECONDS = 2.0
"""How long to wait for the run folder: its storage may be what hangs."""


class Leave(NamedTuple):
    """Why this rank exits."""

    code: int
    message: str


@dataclass(frozen=True)
class Outside:
    """Callbacks through which the watch learns of other ranks' exits and reports its own."""

    ended_elsewhere: Callable[[], int | None]
    """Returns the exit code with which another rank has ended the run, or None; reads the run folder."""
    stopped: Callable[[], Leave | None]
    """Returns how to exit if this rank was asked to stop and there is nothing to save, else None."""
    leave: Callable[[Leave], None]
    """Reports the reason; the process exits afterwards."""
    tell: Callable[[list[dict[str, Any]]], None] | None = None
    """Records what each rank is doing (`Watch.states`), on rank 0; its failures are ignored."""


class Watch:
    """The watchdog thread; it runs from `start` until `stop`."""

    def __init__(self, ranks: Ranks, timeout_seconds: float) -> None:
        """Open the board. This is a collective: every rank must call it."""
        self._rank, self._size = ranks.rank, ranks.size
        self._threads = {"main": ranks.phases, "saving": ranks.saving}
        self._limit = timeout_seconds * _SHARE_OF_TIMEOUT
        self._limit_alone = timeout_seconds * _SHARE_ALONE
        self._stop = threading.Event()
        self._silence = max(_SILENT_SHARE * self._limit, _SILENT_BEATS * _BEAT_SECONDS)
        self._board: Board | None = open_board(ranks) if ranks.size > 1 else None
        self._beat, self._beaten = 0, 0.0
        self._since = Since(STORE_SECONDS + _ANSWER_SECONDS + 1.0)
        self._storage = Patience(_ANSWER_SECONDS, "the storage")
        self._told, self._telling = time.monotonic(), Patience(_ANSWER_SECONDS, "the storage")

    def start(self, outside: Outside) -> None:
        """Start watching."""

        def watch() -> None:
            while not self._stop.wait(_INTERVAL_SECONDS):
                self._tell(outside)
                if (reason := self._reason(outside)) is not None and not self._stop.is_set():
                    if reason.message:
                        outside.leave(reason)
                    os._exit(reason.code)

        threading.Thread(target=watch, name="watch-other-ranks", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()

    def states(self) -> list[dict[str, Any]]:
        """Return what each rank is doing: its phase, since when (seconds since 1970), and how long it has been silent.

        Raises:
            OSError: if the board cannot be read; so do `TimeoutError` and `ValueError`.
        """
        own = {thread: [p.number, p.name, p.entered] for thread, p in self._threads.items()}
        notes = {self._rank: (own, 0.0)}
        if self._board is not None:
            notes |= self._others(self._board, _MOST_TOLD)
        return [
            {
                "rank": rank, "doing": note["main"][1], "since": note["main"][2], "saving": note["saving"][1],
                "silent_seconds": round(silent, 1),
            }
            for rank, (note, silent) in sorted(notes.items())
        ]  # fmt: skip

    def _tell(self, outside: Outside) -> None:
        tell = outside.tell
        if tell is None or self._rank != 0 or time.monotonic() - self._told < _TELL_SECONDS:
            return
        self._told = time.monotonic()
        with suppress(OSError, ValueError, FsdpQloraError):  # a slow disk or board must not hold up the watch
            states = self.states()
            self._telling.ask(lambda: tell(states))

    def _reason(self, outside: Outside) -> Leave | None:
        """Return why this rank must exit, or None."""
        self._since.look()
        try:
            code = self._storage.ask(outside.ended_elsewhere)
        except TimeoutError:
            code = None
        if code is not None:
            self._stop.wait(_GRACE_SECONDS)  # a rank that notices the failure itself exits on its own
            return Leave(code, "")
        if outside.stopped() is not None and not self._stop.wait(_GRACE_SECONDS):
            return outside.stopped()  # None if the main thread has moved on meanwhile
        return self._stuck() or self._late()

    def _stuck(self) -> Leave | None:
        """Return a reason to exit if this rank's own work makes no progress."""
        for thread, phases in self._threads.items():
            alone, name = phases.alone, phases.name
            still = self._since.unchanged(f"{thread}'s work", phases.signs)
            if alone and still > self._limit_alone:
                return Leave(
                    StorageError.exit_code,
                    f"rank {self._rank} is stuck in {name!r}: no progress for {still:.0f} s. Is a file "
                    f"system not responding? (The limit is {self._limit_alone:.0f} s, {100 * _SHARE_ALONE:.0f} % of "
                    "launcher.timeout_seconds.)",
                )
        return None

    def _late(self) -> Leave | None:
        """Post this rank's state; if it has waited for too long, return a reason that names who holds it up."""
        if self._board is None:
            return None
        try:
            self._show(self._board)
            others = self._others(self._board) if self._waited()[0] > self._limit - 2 * self._silence else {}
        except (ValueError, OSError) as error:  # rank 0 serves the board and is gone or stopped; or the disk is full
            others = error
        self._since.look()  # the board may have been slow to answer
        waited, thread = self._waited()
        if waited < self._limit:
            return None
        if isinstance(others, Exception):
            message = f"rank {self._rank} has waited in {self._threads[thread].name!r} for {waited:.0f} s"
            return Leave(1, f"{message} and cannot reach the other ranks: {others}.")
        missing = self._missing(others, thread)
        return Leave(1, f"{missing}; the other ranks waited {waited:.0f} s.") if missing else None

    def _waited(self) -> tuple[float, str]:
        """Return the longest time that a thread has been in its current phase, and that thread's name."""
        return max(
            (0.0 if phases.name == AT_REST else self._since.unchanged(thread, phases.number), thread)
            for thread, phases in self._threads.items()
        )

    def _show(self, board: Board) -> None:
        if (now := time.monotonic()) - self._beaten < _BEAT_SECONDS:
            return
        self._beat, self._beaten = self._beat + 1, now
        doing = {thread: [p.number, p.name, p.entered] for thread, p in self._threads.items()}
        board.write(str(self._rank), json.dumps({**doing, "beat": self._beat, "process": os.getpid()}))

    def _others(self, board: Board, most: int | None = None) -> dict[int, tuple[dict[str, Any], float]]:
        """Return the other ranks' posted states, and the seconds since each one's last heartbeat."""
        others = {}
        for rank in range(self._size if most is None else min(self._size, most)):
            if rank != self._rank and (note := board.read(str(rank))) is not None:
                shown = json.loads(note)
                others[rank] = shown, self._since.unchanged(f"rank {rank}", shown["beat"])
        return others

    def _missing(self, others: dict[int, tuple[dict[str, Any], float]], thread: str) -> str:
        mine = self._threads[thread]
        never = [
            f"rank {rank} never reached {mine.name!r} (last seen entering {shown[thread][1] or 'the end of it'!r} "
            f"{time.time() - shown[thread][2]:.0f} s ago)"
            for rank, (shown, _) in others.items()
            if shown[thread][0] < mine.number
        ]
        still = [
            f"rank {rank} is stuck in {shown[thread][1]!r}: no sign of life for {silent:.0f} s"
            for rank, (shown, silent) in others.items()
            if silent > self._silence
        ]
        return "; ".join(never or still)
