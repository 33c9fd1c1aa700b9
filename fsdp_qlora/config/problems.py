"""What is wrong with some settings, and which others can still be checked: so that one message names everything.

A rule that needs a setting without a valid value cannot tell anything. `hidden` gives it settings that raise an
exception when it reads such a one; all other rules run as usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A message for the user, and the settings whose values are not known because of it."""

    message: str
    unknown: frozenset[str] = frozenset()
    """Dotted keys; the name of a group stands for all its keys."""


class UnknownValueError(Exception):
    """A rule has read a setting whose value is not known."""


def hidden(settings: _T, unknown: Collection[str], prefix: str = "") -> _T:
    """Return the settings, where reading one of the ``unknown`` keys raises `UnknownValueError`."""
    kind = type(settings)
    own = {name for name in vars(settings) if f"{prefix}{name}" in unknown}

    def read(self: Any, name: str) -> Any:
        if name in own:
            raise UnknownValueError(f"{prefix}{name}")
        return object.__getattribute__(self, name)

    partial: Any = type(kind.__name__, (kind,), {"__getattribute__": read})
    copy = object.__new__(partial)
    for name, value in vars(settings).items():
        if name not in own:
            inner = hidden(value, unknown, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else value
            vars(copy)[name] = inner
    return copy


def messages(rules: Iterable[Callable[[_T], Iterator[str]]], settings: _T, unknown: Collection[str] = ()) -> list[str]:
    """Return what the rules say about the settings; a rule ends where it reads an ``unknown`` one."""
    readable = hidden(settings, unknown) if unknown else settings
    said: list[str] = []
    for rule in rules:
        try:
            for message in rule(readable):
                said.append(message)
        except UnknownValueError:
            continue
    return said
