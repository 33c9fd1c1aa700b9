"""Makes a process die with its parent, and tells whether one lives. No torch: it must take effect before imports."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "FSDP_QLORA_SWEEP_PARENT"
"""Environment variable with the process id of the sweep that started a job."""


def die_with_sweep() -> None:
    """Make a job die with the sweep that started it; do nothing in any other process."""
    if (parent := os.environ.pop(PARENT_VARIABLE, "")).isdecimal():
        die_with_parent(int(parent))


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies, so that a killed launcher leaves no orphans writing.

    Args:
        parent: the expected process id of the parent; a different one means that the parent has already died.
    """
    if sys.platform == "linux":
        expected = parent or os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != expected:
            os.kill(os.getpid(), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
