"""Determines how a run ended: one verdict that gives the launcher's exit code, exit.json and its last line."""

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
from fsdp_qlora.run.troubleshooting import printed

_LOCK_SECONDS = 3.0
"""How long killed ranks may keep the run folder locked."""


def verdict(
    exit_file: Path, restarts: int, agent_code: int, stopped: Ending | None = None, standstill: Ending | None = None
) -> Ending:
    """Return how the run ended.

    Args:
        exit_file: base path of the files in which ranks reported how they ended; agent.json next to it names a rank
            killed by a signal.
        restarts: the maximum number of restarts; the last start with reports counts.
        agent_code: exit code of torch's elastic agent; negative if a signal ended it.
        stopped: the ending of a run that signals ended before any rank could report (`stopped_by`).
        standstill: the ending that the launcher found itself, if no rank gave a sign of life.
    """
    starts = (tellings(exit_file, attempt) for attempt in range(restarts, -1, -1))
    told: Sequence[Ending] = next((endings for endings in starts if endings), [])
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


def stopped_by(signals: int, begun: bool, saves: bool = True) -> Ending | None:
    """Return the ending of a run after this many signals, if no rank reports one.

    Args:
        signals: number of signals that the launcher received.
        begun: whether the ranks had started their work.
        saves: whether the verb saves checkpoints.
    """
    if signals > 1:
        lost = "; progress since the last checkpoint is lost" if saves else ""
        return Ending(1, 0, f"stopped immediately by a second signal{lost}.")
    if signals == 1 and not begun:
        return Ending(STOPPED_EXIT_CODE, 0, NOTHING_TO_SAVE if saves else "stopped by a signal.")
    return None


def _killed(agent_file: Path) -> Ending | None:
    """Return the ending of a rank killed by a signal other than SIGTERM, with which the agent ends the others."""
    try:
        agent: dict[str, Any] = json.loads(agent_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if agent["code"] >= 0 or agent["code"] == -signal.SIGTERM:
        return None
    name = signal.Signals(-agent["code"]).name
    why = " Out of memory? See the kernel's log (dmesg)." if name == "SIGKILL" else ""
    return Ending(1, agent["rank"], f"rank {agent['rank']} was killed by {name}.{why}")


def record(ending: Ending, folder: RunFolder, since: float) -> None:
    """Make sure exit.json holds this ending, unless another run has the folder or its storage fails.

    Args:
        ending: the verdict.
        folder: the run folder.
        since: time at which this start began; an older exit.json belongs to an earlier start and is replaced.
    """
    if not folder.config_file.parent.is_dir():
        return
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            folder.lock()
            break
        except RunFolderError:  # held by ranks that are just ending, or by another run
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)
        except (FsdpQloraError, OSError):  # a problem here does not change how the run ended
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
        print(f"fsdp-qlora, rank {ending.rank}: {printed(ending.message)}", file=sys.stderr, flush=True)
