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

from fsdp_qlora.errors import FsdpQloraError, StorageError

CONFIG_VARIABLE = "FSDP_QLORA_RESOLVED_CONFIG"
"""Environment variable that holds the composed settings as JSON, set by our launcher for its ranks."""
EXIT_VARIABLE = "FSDP_QLORA_EXIT_FILE"
"""Environment variable that names the file through which a rank tells our launcher how it ended."""

_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


def tell_launcher(code: int, message: str = "", expected: bool = True) -> bool:
    """Write how this rank ended to our launcher's file; return False if another rank did so first.

    ``expected`` is False for what may be an echo of another rank's end (a broken connection).
    """
    file = os.environ.get(EXIT_VARIABLE)
    if not file:
        return True
    staging = Path(f"{file}.{os.getpid()}")
    staging.write_text(
        json.dumps({"code": code, "rank": int(os.environ.get("RANK", "0")), "message": message, "expected": expected})
    )
    try:
        os.link(staging, file)
    except FileExistsError:
        return False
    finally:
        staging.unlink()
    return True


def others_failed() -> bool:
    """Whether our launcher's file says that some rank has failed."""
    file = os.environ.get(EXIT_VARIABLE)
    try:
        return bool(file) and json.loads(Path(str(file)).read_text())["code"] not in (0, 75)
    except (OSError, ValueError, KeyError):
        return False


def guarded(work: Callable[[], int]) -> int:
    """Run a verb; turn what escapes into a message and an exit code."""
    expected = True
    try:
        code, message = work(), ""
    except FsdpQloraError as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            traceback.print_exc()
        code, message = StorageError.exit_code if error.errno in _STORAGE_ERRORS else 1, f"{error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted."
    except SystemExit as request:
        code, message = request.code if isinstance(request.code, int) else 1, ""
    except BaseException as error:  # a bug of ours, or of what we stand on: the traceback helps to find it
        code, message, expected = 1, f"{type(error).__name__}: {error}", False
        if not others_failed():
            traceback.print_exc()
    first = tell_launcher(code, message, expected)
    if message and (EXIT_VARIABLE not in os.environ):
        print(f"{_where()}{message}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        if code not in (0, 75):
            _record_for_torchrun(message)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit. After a failure, closing a process group whose other ranks wait in a collective can hang. After
        # a success, gloo's threads outlive the group, and one that drops a tensor while the interpreter is being
        # finalized aborts the process ("terminate called without an active exception").
        os._exit(code if first or code in (0, 75) else 1)
    return code


def _where() -> str:
    rank = os.environ.get("RANK")
    return f"fsdp-qlora, rank {rank}: " if rank is not None else "fsdp-qlora: "


def _record_for_torchrun(message: str) -> None:
    """Let torchrun show this rank's message in its summary, which is the last thing on the screen."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE") and "torch" in sys.modules:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(RuntimeError(message))
