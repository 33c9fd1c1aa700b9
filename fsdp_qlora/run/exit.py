"""How a process ends: one message for the user, the true exit code, and a report to the launcher.

torchrun turns every worker's exit code into 1, so the code also goes into files: exit.json in the run folder, and a
file that our own launcher names in the environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from fsdp_qlora.errors import REMEDIES, STOPPED_EXIT_CODE, FsdpQloraError, StorageError, with_remedy
from fsdp_qlora.files.write import write_first
from fsdp_qlora.run.troubleshooting import printed

CONFIG_VARIABLE = "FSDP_QLORA_RESOLVED_CONFIG"
"""Environment variable with the path of the composed settings (JSON), which our launcher sets for its ranks."""
EXIT_VARIABLE = "FSDP_QLORA_EXIT_FILE"
"""Environment variable with the base path of the files in which ranks tell our launcher how they ended."""

NOTHING_TO_SAVE = "stopped before the first step; there was nothing to save."


@dataclass(frozen=True)
class Ending:
    """How a rank ended: the source of the exit code, exit.json and the last line on the screen."""

    code: int
    rank: int
    message: str = ""
    expected: bool = True
    """False if the error may be a consequence of another rank's end (a broken connection)."""
    time: float = field(default_factory=time.time)

    @property
    def failed(self) -> bool:
        """Whether the exit code means neither success nor a stop on request."""
        return self.code not in (0, STOPPED_EXIT_CODE)


def own_rank() -> int:
    """Return this process's rank; 0 outside a process group."""
    return int(os.environ.get("RANK", "0"))


def ending_of(error: BaseException) -> Ending:
    """Return how a process that hits ``error`` ends."""
    rank = own_rank()
    if isinstance(error, FsdpQloraError):
        return Ending(error.exit_code, rank, str(error))
    if isinstance(error, OSError) and error.errno in REMEDIES:  # one that no code of ours has caught and explained
        return Ending(StorageError.exit_code, rank, with_remedy(error))
    if isinstance(error, KeyboardInterrupt):
        return Ending(130, rank, "interrupted.")
    if isinstance(error, SystemExit):
        return Ending(error.code if isinstance(error.code, int) else 1, rank, expected=False)
    return Ending(1, rank, f"{type(error).__name__}: {error}", expected=False)


def tell_launcher(ending: Ending) -> None:
    """Write how this rank ended to its own file, where our launcher looks for it."""
    if has_launcher():
        file = Path(f"{os.environ[EXIT_VARIABLE]}.{restart_count()}.{own_rank()}")
        write_first(file, json.dumps(asdict(ending)))


def tellings(exit_file: Path, attempt: int) -> list[Ending]:
    """Return what the ranks of the ``attempt``-th start (from 0) have reported, oldest first."""
    endings = []
    for file in exit_file.parent.glob(f"{exit_file.name}.{attempt}.*"):
        with suppress(OSError, ValueError):
            endings.append(Ending(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(endings, key=lambda ending: ending.time)


def first_failure(told: Sequence[Ending]) -> Ending | None:
    """Return the failure that ended a run: the first that a rank could explain, else the first of all."""
    failed = [ending for ending in told if ending.code != 0]
    return next((ending for ending in failed if ending.expected), failed[0] if failed else None)


def has_launcher() -> bool:
    """Whether our own launcher started this process and prints what it reports."""
    return EXIT_VARIABLE in os.environ


def restart_count() -> int:
    """Return how often torch's elastic agent has restarted the ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def end_by_signal(_number: int, _frame: object) -> NoReturn:
    """Handle a signal that asks to stop before there is anything to save."""
    ending = Ending(STOPPED_EXIT_CODE, own_rank(), NOTHING_TO_SAVE)
    tell_launcher(ending)
    if not has_launcher() and ending.rank == 0:
        os.write(2, f"fsdp-qlora: {ending.message}\n".encode())  # not print, which the signal may have interrupted
    os._exit(ending.code)


def _told(attempt: int) -> Ending | None:
    return first_failure(tellings(Path(os.environ[EXIT_VARIABLE]), attempt)) if has_launcher() else None


def _ended_for_good() -> Ending | None:
    """Return how the previous attempt ended, if another attempt would end the same way."""
    before = _told(restart_count() - 1) if restart_count() else None
    return before if before is not None and before.expected else None


def guarded(work: Callable[[], int]) -> int:
    """Run a verb, turn exceptions into a message and an exit code, and return that code.

    Under torchrun or our launcher it does not return but exits the process.
    """
    quiet = False
    try:
        ending = _ended_for_good() or Ending(work(), own_rank())
    except BaseException as error:
        ending = ending_of(error)
        quiet = isinstance(error, FsdpQloraError) and error.alike and ending.rank != 0
        bug = not ending.expected and not isinstance(error, SystemExit)  # ours or a dependency's
        if bug and _told(restart_count()) is None:
            traceback.print_exc()
    tell_launcher(ending)
    if ending.message and not quiet and not has_launcher():
        print(f"{_where()}{printed(ending.message)}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        if ending.failed:
            _record_for_torchrun(ending.message)
        leave(ending.code)
    return ending.code


def leave(code: int) -> NoReturn:
    """End a process that may have had a process group.

    Not by `sys.exit`. After a failure, closing a process group can hang while other ranks wait in a collective. And
    gloo's threads outlive the group: one that frees a tensor during interpreter finalization aborts the process
    ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _where() -> str:
    rank = os.environ.get("RANK")
    return f"fsdp-qlora, rank {rank}: " if rank is not None else "fsdp-qlora: "


def _record_for_torchrun(message: str) -> None:
    """Make torchrun show this rank's message in its summary, the last thing on the screen."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE") and "torch" in sys.modules:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(RuntimeError(message))
