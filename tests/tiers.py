"""Which cases of a matrix `make test` runs; the others are of the full tier."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_in_full(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return the cases, marked ``full`` where they are not among the ``quick`` ones; a tuple has several arguments."""
    marked = []
    for case in cases:
        arguments = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*arguments, marks=() if case in quick else pytest.mark.full))
    return marked
