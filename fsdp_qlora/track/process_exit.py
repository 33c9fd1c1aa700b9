"""How a process ends: one message for a person, the true exit code, and word of it to the launcher.

torchrun turns every worker's code into 1, so the code also goes into files: the run folder's exit.json, and one that
our own launcher names in the environment.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import STOPPED_EXIT_CODE, FsdpQloraError, StorageError
from fsdp_qlora.files import write_first
from fsdp_qlora.shown import visible

CONFIG_VARIABLE = "FSDP_QLORA_RESOLVED_CONFIG"
"""Environment variable that names the file of the composed settings (JSON), set by our launcher for its ranks."""
EXIT_VARIABLE = "FSDP_QLORA_EXIT_FILE"
"""Environment variable that names the file through which a rank tells our launcher how it ended."""

_REMEDIES = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room in the quota", errno.EACCES: "", errno.EPERM: "",
    errno.EROFS: "it is mounted read-only", errno.EIO: "", errno.ESTALE: "the network file system has lost it",
    errno.ENOTDIR: "", errno.ENAMETOOLONG: "choose shorter names", errno.ELOOP: "its links go round in circles",
    errno.EFBIG: "raise the limit on files (ulimit -f)", errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give", errno.ENOTSUP: "this file system lacks the operation",
    errno.ENOSYS: "this file system lacks the operation", errno.ENOLCK: "this file system lacks locks",
    errno.ENOMEM: "the machine has no memory left for it (see also `ulimit -v`)",
    errno.EAGAIN: "raise the limit on processes (ulimit -u)",
}  # fmt: skip
"""What an operating system refuses that is no bug of ours, and what helps."""


def tell_launcher(code: int, message: str = "", expected: bool = True) -> bool:
    """Write how this rank ended to our launcher's file; return False if another rank did so first.

    ``expected`` is False for what may be an echo of another rank's end (a broken connection).
    """
    if not has_launcher():
        return True
    file = exit_file(restart_count())
    body = {"code": code, "rank": int(os.environ.get("RANK", "0")), "message": message, "expected": expected}
    return write_first(file, json.dumps(body))


def has_launcher() -> bool:
    """Whether our own launcher started this process, and prints what it is told."""
    return EXIT_VARIABLE in os.environ


def restart_count() -> int:
    """Return how often torch's elastic agent has started the ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def exit_file(attempt: int) -> Path:
    """Return the file in which the ranks of the ``attempt``-th start tell our launcher how they ended."""
    return Path(f"{os.environ[EXIT_VARIABLE]}.{attempt}")


def read_exit(file: Path) -> dict[str, Any] | None:
    """Return what `tell_launcher` wrote, or None."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def others_failed() -> bool:
    """Whether our launcher's file says that some rank has failed."""
    told = read_exit(exit_file(restart_count())) if has_launcher() else None
    return told is not None and told["code"] not in (0, STOPPED_EXIT_CODE)


def _ended_for_good() -> dict[str, Any] | None:
    """Return how the attempt before this one ended, if another attempt would end the same way."""
    if not (has_launcher() and restart_count()):
        return None
    told = read_exit(exit_file(restart_count() - 1))
    return told if told is not None and (told["expected"] or told["code"] == STOPPED_EXIT_CODE) else None


def guarded(work: Callable[[], int]) -> int:
    """Run a verb; turn what escapes into a message and an exit code."""
    expected, quiet = True, False
    try:
        if (before := _ended_for_good()) is not None:
            code, message = before["code"], before["message"]
        else:
            code, message = work(), ""
    except FsdpQloraError as error:
        code, message = error.exit_code, str(error)
        quiet = error.alike and os.environ.get("RANK", "0") != "0"
    except OSError as error:
        code, message = _of_the_system(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted."
    except SystemExit as request:
        code, message = request.code if isinstance(request.code, int) else 1, ""
    except BaseException as error:  # a bug of ours, or of what we stand on: the traceback helps to find it
        code, message, expected = 1, f"{type(error).__name__}: {error}", False
        if not others_failed():
            traceback.print_exc()
    first = tell_launcher(code, message, expected)
    if message and not quiet and not has_launcher():
        print(f"{_where()}{visible(message)}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        if code not in (0, STOPPED_EXIT_CODE):
            _record_for_torchrun(message)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit. After a failure, closing a process group whose other ranks wait in a collective can hang. After
        # a success, gloo's threads outlive the group, and one that drops a tensor while the interpreter is being
        # finalized aborts the process ("terminate called without an active exception").
        os._exit(code if first or code in (0, STOPPED_EXIT_CODE) else 1)
    return code


def _of_the_system(error: OSError) -> tuple[int, str]:
    """Return code and message of an error that no code of ours has put into words."""
    if error.errno not in _REMEDIES:
        traceback.print_exc()
        return 1, f"{error}"
    remedy = _REMEDIES[error.errno]
    return StorageError.exit_code, f"{error}{f' ({remedy})' if remedy else ''}"


def _where() -> str:
    rank = os.environ.get("RANK")
    return f"fsdp-qlora, rank {rank}: " if rank is not None else "fsdp-qlora: "


def _record_for_torchrun(message: str) -> None:
    """Let torchrun show this rank's message in its summary, which is the last thing on the screen."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE") and "torch" in sys.modules:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(RuntimeError(message))
