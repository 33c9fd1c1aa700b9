"""Imports bitsandbytes without the compiled code that it would download.

Where a CPU has AVX512-BF16 and the package ``kernels`` is installed, importing bitsandbytes downloads a kernel from the
hub and runs it, whatever was asked for; PEFT imports bitsandbytes. So packages that use either import this module
first, in their ``__init__``. We do not call the operation that the kernel serves (``gemv_4bit``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_HUB_KERNELS = "kernels"
_COMPLAINS = logging.getLogger("bitsandbytes.backends.cpu.ops")


@contextmanager
def _not_importable(name: str) -> Iterator[None]:
    """Let ``import name`` fail meanwhile, by None in its place (https://docs.python.org/3/reference/import.html)."""
    loaded = {name: sys.modules[name]} if name in sys.modules else {}
    level = _COMPLAINS.level
    sys.modules[name] = None  # type: ignore[assignment]
    _COMPLAINS.setLevel(logging.ERROR)  # it advises installing the package
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(loaded)
        _COMPLAINS.setLevel(level)


with _not_importable(_HUB_KERNELS):
    import bitsandbytes  # noqa: F401
