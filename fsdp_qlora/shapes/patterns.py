"""Patterns of names: a glob on the whole name, or without ``*`` and ``?``, a name or its last parts (``q_proj``)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from fsdp_qlora.errors import PlanError

T = TypeVar("T")


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` means ``name``."""
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def endings(names: Iterable[str]) -> list[str]:
    """Return the distinct last parts of ``names``, in order of appearance."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def by_name(key: str, patterns: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """Return the value for each of ``names`` that a pattern means; later patterns win.

    Args:
        key: the setting, for the message.
        patterns: pattern -> value.
        names: all names.

    Raises:
        PlanError: if a pattern means none of them.
    """
    names = list(names)
    values: dict[str, T] = {}
    for pattern, value in patterns.items():
        meant = [name for name in names if matches(name, pattern)]
        if not meant:
            raise PlanError(
                f"{key}: {pattern!r} matches none of the {len(names)} targets ({', '.join(endings(names))})."
            )
        values |= dict.fromkeys(meant, value)
    return values


def layer_number(name: str, layers: Iterable[str]) -> int | None:
    """Return the place in ``layers`` of the decoder layer that the module ``name`` is in, or None."""
    return next((place for place, layer in enumerate(layers) if name.startswith(layer + ".")), None)


def numbered(pattern: str) -> bool:
    """Whether a pattern holds a number, which may be that of a layer."""
    return re.search(r"\d", pattern) is not None
