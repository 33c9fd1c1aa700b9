"""The launcher's view of its ranks: notes that their watches write to its folder once a second."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsdp_qlora.distributed.parent import is_alive
from fsdp_qlora.distributed.patience import Since
from fsdp_qlora.run.exit import Ending

_LOOK_SECONDS = 1.0
_LEAVE_SECONDS = 3.0
"""How long a killed process may take to disappear."""


class LifeSigns:
    """Reads the ranks' notes in the folder where they meet."""

    def __init__(self, meeting: Path, timeout_seconds: float) -> None:
        self._meeting, self._limit = meeting, timeout_seconds
        self._since, self._looked = Since(2 * _LOOK_SECONDS), 0.0

    def _notes(self) -> dict[int, dict[str, Any]]:
        newest: dict[int, tuple[float, dict[str, Any]]] = {}
        for file in self._meeting.glob("board-*/[0-9]*"):  # one board for each start of the ranks
            with suppress(OSError, ValueError):
                written, note = file.stat().st_mtime, json.loads(file.read_text(encoding="utf-8"))
                newest[int(file.name)] = max(
                    newest.get(int(file.name), (0.0, note)), (written, note), key=lambda x: x[0]
                )
        return {rank: note for rank, (_, note) in newest.items()}

    @property
    def begun(self) -> bool:
        """Whether the ranks have started to watch each other."""
        return bool(self._notes())

    def standstill(self) -> Ending | None:
        """Return an ending if no rank gives a sign of life; while some still do, they report the silent ones."""
        if (now := time.monotonic()) - self._looked < _LOOK_SECONDS:
            return None
        self._looked = now
        self._since.look()
        notes = self._notes()
        silent = self._since.unchanged("beats", {rank: note["beat"] for rank, note in notes.items()})
        if not notes or silent < self._limit:
            return None
        places = ", ".join(f"rank {rank} in {note['main'][1]!r}" for rank, note in sorted(notes.items()))
        message = f"all ranks are stuck: no sign of life for {silent:.0f} s; last seen: {places}."
        return Ending(1, min(notes), message)

    def left_behind(self) -> list[str]:
        """Return the ranks that still exist after being killed, because a driver or storage holds them."""
        waiting = {rank: note["process"] for rank, note in self._notes().items()}
        deadline = time.monotonic() + _LEAVE_SECONDS
        while (waiting := {r: pid for r, pid in waiting.items() if is_alive(pid)}) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"rank {rank} (process {pid})" for rank, pid in sorted(waiting.items())]
