"""A thread that ends this rank when another one has failed.

The first rank that fails writes its message to the run folder (`exit.json`). The others may be waiting in a collective
that will never end, where Python runs no signal handler; this thread sees the file and leaves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

_INTERVAL_SECONDS = 0.5
_GRACE_SECONDS = 3.0


def leave_when(failed: Callable[[], bool]) -> threading.Event:
    """Start a daemon thread that ends the process with code 1 soon after ``failed()`` is true.

    Returns:
        An event; set it to stop watching.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_INTERVAL_SECONDS):
            if failed():
                time.sleep(_GRACE_SECONDS)  # a rank that sees the failure itself ends by its own means
                if not stop.is_set():
                    os._exit(1)

    threading.Thread(target=watch, name="watch-other-ranks", daemon=True).start()
    return stop
