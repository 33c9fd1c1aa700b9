"""How far a run is: whether it still runs, how long it takes per step, and how long it will take."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fsdp_qlora.distributed.parent import is_alive
from fsdp_qlora.errors import SecurityError
from fsdp_qlora.files.read import read_regular
from fsdp_qlora.report.metrics import Line, mappings, number
from fsdp_qlora.report.record import Run

_RECENT = 50
"""Lines of training from which the speed is taken."""
_SILENT_SECONDS = 120.0
"""After this long without a sign of life, and as long as a step takes besides, a run elsewhere counts as silent."""


@dataclass(frozen=True)
class Progress:
    """How far a run is at a moment; times in seconds."""

    state: str
    """In a few words: ``running``, ``finished``, ..."""
    runs: bool
    """Whether it may still write something."""
    step: int
    total: int | None
    elapsed: float | None
    left: float | None
    """None if that cannot be said."""
    quiet: float | None
    """Since the last sign of life."""


def progress_of(run: Run, now: float) -> Progress:
    """Return how far ``run`` is at the time ``now``, in seconds since 1970."""
    metrics, total = run.metrics, run.total_steps
    begun = number(run.start, "time")
    told = number(run.ranks, "time")
    signs = [time for time in (metrics.last_time, told, begun) if time is not None]
    quiet = now - max(signs) if signs else None
    pace = _pace(metrics.steps)
    if run.ending is not None or run.finished:
        state, runs = run.state, False
    else:
        state, runs = _living(run.folder, quiet, pace)
    end = now if runs else (number(run.ending or {}, "time") or metrics.last_time)
    left = None
    if runs and pace is not None and total is not None and metrics.last_time is not None:
        left = max(0.0, pace * (total - metrics.last_step) - (now - metrics.last_time))
    elapsed = None if begun is None or end is None else max(0.0, end - begun)
    return Progress(state, runs, metrics.last_step, total, elapsed, left, quiet)


def _pace(steps: list[Line]) -> float | None:
    """Return seconds per step of late, with the evaluations and pauses between the steps."""
    recent = steps[-_RECENT:]
    times = [(line["step"], time) for line in recent if (time := number(line, "time")) is not None]
    if len(times) >= 2 and times[-1][0] > times[0][0] and times[-1][1] >= times[0][1]:
        return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])
    seconds = [each for line in recent if (each := number(line, "step_seconds")) is not None]
    return median(seconds) if seconds else None


def _living(folder: Path, quiet: float | None, pace: float | None) -> tuple[str, bool]:
    """Return the state of a run that has not said how it ended, and whether it may go on."""
    holder = _holder(folder)
    if holder is not None and holder[1] == socket.gethostname():
        if is_alive(holder[0]):
            return "running", True
        return "killed: it ended without saying why", False
    where = "" if holder is None else f" on {holder[1]}"
    if quiet is not None and quiet > _SILENT_SECONDS + 3 * (pace or 0.0):
        return f"running{where}, or killed: no sign of life for {quiet:.0f} s", True
    return f"running{where}", True


def _holder(folder: Path) -> tuple[int, str] | None:
    """Return the process that locked the folder last, and its machine (`RunFolder.lock`)."""
    try:
        text = read_regular(folder / ".lock.holder", 4096).decode(errors="replace")
    except (OSError, SecurityError):
        return None
    match = re.match(r"process (\d{1,9}) on (\S{1,255}), since ", text)
    return None if match is None else (int(match[1]), match[2])


def rank_states(run: Run) -> list[tuple[str, str, float | None, float | None]]:
    """Return of each rank: its number, what it is doing, since when (seconds since 1970), and how long it is silent."""
    states = []
    for each in mappings(run.ranks.get("ranks")):
        doing = str(each.get("doing") or "at rest")
        if saving := each.get("saving"):
            doing += f"; beside it {saving}"
        states.append((str(each.get("rank", "?")), doing, number(each, "since"), number(each, "silent_seconds")))
    return states
