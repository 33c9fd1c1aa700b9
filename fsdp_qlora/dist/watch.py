"""A thread beside each rank: it ends the rank when another one has failed, and says who holds up the others.

A rank whose main thread waits in a collective runs no signal handler and raises nothing until the collective's own
timeout, which with NCCL is an abort without a word. This thread goes on: it puts the rank's phase and a sign of life on
a board that all ranks can read, and when this rank has been waiting for too long it looks who never came, and who came
and gives no sign any more.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fsdp_qlora.dist.board import Board, open_board
from fsdp_qlora.dist.mesh import Ranks

_INTERVAL_SECONDS = 0.5
_BEAT_SECONDS = 1.0
"""How often a rank gives a sign of life."""
_GRACE_SECONDS = 3.0
_SHARE_OF_TIMEOUT = 0.8
"""Share of the collectives' timeout after which a waiting rank speaks: before they give up."""
_SILENT_SHARE = 0.25
"""Share of that time without a sign of life after which a rank stands still, and at least so many beats:"""
_SILENT_BEATS = 5


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
        self._silence = max(_SILENT_SHARE * self._limit, _SILENT_BEATS * _BEAT_SECONDS)
        self._board: Board | None = open_board(ranks) if ranks.size > 1 else None
        self._beat, self._beaten = 0, 0.0
        self._seen: dict[int, tuple[int, float]] = {}
        """The last sign of life of each other rank, and when it was first seen (this rank's own clock)."""

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
        """Show where this rank is; return who holds it up if it has waited there for too long."""
        if self._board is None:
            return None
        number, name, waited = self._phases.number, self._phases.name, time.monotonic() - self._phases.since
        try:
            if (now := time.monotonic()) - self._beaten >= _BEAT_SECONDS:
                self._beat, self._beaten = self._beat + 1, now
                self._board.write(str(self._rank), json.dumps([number, name, time.time(), self._beat]))
            if waited < self._limit - 2 * self._silence:
                return None
            others = self._others(self._board)
        except (ValueError, OSError) as error:  # rank 0, where it holds the board, is gone or still; or a full disk
            if waited < self._limit:
                return None
            return f"rank {self._rank} waits in {name!r} for {waited:.0f} s, and cannot ask the others: {error}."
        if waited < self._limit:
            return None
        missing = [
            f"rank {rank} never reached {name!r} (last seen entering {theirs!r} {time.time() - when:.0f} s ago)"
            for rank, (count, theirs, when, _) in others.items()
            if count < number
        ] or [
            f"rank {rank} stands still in {theirs!r}: no sign of life for {silent:.0f} s"
            for rank, (_, theirs, _, silent) in others.items()
            if silent > self._silence
        ]
        return f"{'; '.join(missing)}; the other ranks waited {waited:.0f} s." if missing else None

    def _others(self, board: Board) -> dict[int, tuple[int, str, float, float]]:
        """Return the other ranks' phases (number, name, since when) and for how long they have given no sign."""
        found = {}
        for rank in range(self._size):
            if rank == self._rank or (note := board.read(str(rank))) is None:
                continue
            number, name, when, beat = json.loads(note)
            last, at = self._seen.get(rank, (-1, 0.0))
            if beat != last:
                last, at = beat, time.monotonic()
                self._seen[rank] = last, at
            found[rank] = number, name, when, time.monotonic() - at
        return found
