"""Where modules are looked for: the current folder last, for any number of ranks and however they were started.

``python -m`` and torchrun put the current folder first, where a file ``datasets.py`` hides the package of that name;
the ``fsdp-qlora`` script does not look there at all, and finds no ``data.row_function`` of yours. Imports nothing that
the interpreter has not loaded at its start.
"""

from __future__ import annotations

import os
import sys


def look_here_last() -> None:
    """Make the current folder the last place in which modules are looked for."""
    try:
        here = os.getcwd()  # noqa: PTH109  (pathlib is a file that the current folder could hide)
    except OSError:  # it was deleted
        return
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    if here not in sys.path:
        sys.path.append(here)
