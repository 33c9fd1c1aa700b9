"""Keeps the current folder off the module search path; a ``data.row_function`` gets it as the last entry.

``python -m`` and torchrun put the current folder first, where a file ``datasets.py`` shadows the package of that name.
Putting it last is not safe either: Hydra runs everything in ``hydra_plugins``, torch runs what any ``*.dist-info``
names, and other libraries try to import optional packages. This module imports nothing that the interpreter has not
already loaded at startup, not even ``__future__``.
"""

import os
import sys

# No pathlib: a file in the current folder could shadow it.
_PACKAGES_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120


def leave_here() -> None:
    """Keep this process, and the Python processes it starts, from importing modules from the current folder."""
    here = _current()
    if here is None:
        return
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    if here != _PACKAGES_FOLDER:  # otherwise this package may be found only there
        os.environ["PYTHONSAFEPATH"] = "1"


def look_here_last() -> None:
    """Append the current folder to the module search path, for user code that may run."""
    here = _current()
    if here is not None and here not in sys.path:
        sys.path.append(here)


def _current() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was deleted
        return None
