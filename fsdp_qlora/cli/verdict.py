"""What our launcher makes of an end: one verdict, from which its exit code, exit.json and its last line come."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import STOPPED_EXIT_CODE, FsdpQloraError, RunFolderError
from fsdp_qlora.run.exit import NOTHING_TO_SAVE, Ending, first_failure, tellings
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import visible

_LOCK_SECONDS = 3.0
"""How long the run folder may stay locked by ranks that have been killed."""


def verdict(
    exit_file: Path, restarts: int, agent_code: int, stopped: Ending | None = None, standstill: Ending | None = None
) -> Ending:
    """Return how the run ended.

    Args:
        exit_file: beside it the ranks have told how they ended, and the agent which rank a signal ended.
        restarts: how often the ranks may have been started again; the last start counts.
        agent_code: exit code of torch's elastic agent; negative where a signal ended it.
        stopped: what to say of a run that signals have ended before a rank could tell anything.
        standstill: what the launcher itself has found, if no rank gave a sign of life any more.
    """
    starts = (tellings(exit_file, attempt) for attempt in range(restarts, -1, -1))
    told: Sequence[Ending] = next((found for found in starts if found), [])
    failure = first_failure(told)
    candidates = [
        failure if failure is not None and failure.expected else None,
        told[0] if told and failure is None and (agent_code == 0 or stopped is not None) else None,
        standstill,
        stopped if stopped is not None and (stopped.failed or not told) else None,
        _killed(exit_file.with_name("agent.json")),
        failure,
    ]
    wordless = Ending(
        max(agent_code, 1), 0, f"the ranks exited without reporting an error (launcher code {agent_code})."
    )
    return next((ending for ending in candidates if ending is not None), wordless)


def stopped_by(signals: int, begun: bool) -> Ending | None:
    """Return how a run ends that got so many signals, where no rank says more; ``begun``: its ranks were at work."""
    if signals > 1:
        return Ending(1, 0, "ended at once by a second signal; what came after the last checkpoint is lost.")
    if signals == 1 and not begun:
        return Ending(STOPPED_EXIT_CODE, 0, NOTHING_TO_SAVE)
    return None


def _killed(agent_file: Path) -> Ending | None:
    """Return the end of a rank that a signal ended; SIGTERM is how the agent ends the others."""
    try:
        agent: dict[str, Any] = json.loads(agent_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if agent["code"] >= 0 or agent["code"] == -signal.SIGTERM:
        return None
    name = signal.Signals(-agent["code"]).name
    why = " Out of memory? See the kernel's log (dmesg)." if name == "SIGKILL" else ""
    return Ending(1, agent["rank"], f"rank {agent['rank']} was ended by {name}.{why}")


def record(ending: Ending, folder: RunFolder, since: float) -> None:
    """See to it that exit.json says this, unless the folder is another run's or its storage does not let us.

    Args:
        ending: the verdict.
        folder: the run's.
        since: time at which this start began: a file that is older, or that nobody wrote, is not of this start.
    """
    if not folder.config_file.parent.is_dir():
        return
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            folder.lock()
            break
        except RunFolderError:  # ranks that are just ending, or another run
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)
        except (FsdpQloraError, OSError):  # whatever is wrong there does not change how the run ended
            return
    written = folder.read_exit()
    if written is None or written["time"] < since or written["message"] != ending.message:
        with suppress(OSError):
            folder.clear_exit()
            folder.write_exit(ending.code, ending.rank, ending.message)
    folder.unlock()


def say(ending: Ending) -> None:
    """Print the last line."""
    if ending.message:
        print(f"fsdp-qlora, rank {ending.rank}: {visible(ending.message)}", file=sys.stderr, flush=True)
