"""Dying with one's parent. Imports no torch: it must be in force before anything slow is imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent dies: so that a killed launcher leaves no orphans writing.

    Args:
        parent: process id that the parent should have; another one means that it is dead already.
    """
    if sys.platform == "linux":
        expected = parent or os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != expected:
            os.kill(os.getpid(), signal.SIGKILL)
