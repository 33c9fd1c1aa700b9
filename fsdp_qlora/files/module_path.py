"""Where modules are looked for: not in the current folder, and last of all there for a ``data.row_function`` of yours.

``python -m`` and torchrun put the current folder first, where a file ``datasets.py`` hides the package of that name.
Nor is the last place good enough: Hydra runs all that lies in ``hydra_plugins``, torch what any ``*.dist-info`` names,
and others try packages that need not be installed. Imports nothing that the interpreter has not loaded at its start,
not even ``__future__``.
"""

import os
import sys

# Without pathlib, which is a file that the current folder could hide.
_PACKAGES_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120


def leave_here() -> None:
    """Look for no modules in the current folder, in this process and in those of Python that it starts."""
    here = _current()
    if here is None:
        return
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    if here != _PACKAGES_FOLDER:  # else it may be the only place that has this package
        os.environ["PYTHONSAFEPATH"] = "1"


def look_here_last() -> None:
    """Make the current folder the last place in which modules are looked for: for code that was allowed to run."""
    here = _current()
    if here is not None and here not in sys.path:
        sys.path.append(here)


def _current() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was deleted
        return None
