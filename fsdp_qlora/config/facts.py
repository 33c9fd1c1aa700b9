"""Facts about single settings, stated in their annotations: ``r: Annotated[int, POSITIVE] = 16``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Annotated, Any

from fsdp_qlora.config.choices import Names


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of numbers that a setting accepts."""

    rule: str
    """The range in words: ``must be above 0``."""
    holds: Callable[[float], bool]


@dataclasses.dataclass(frozen=True)
class Fact:
    """A property that a setting either has or lacks."""

    name: str


@dataclasses.dataclass(frozen=True)
class ReadBy:
    """The optimizers that read a setting. With any other it does not block a resume and is not recorded."""

    optimizers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FormatOption:
    """A setting that only formats read that take this option (`Format.takes`); without one, as with `ReadBy`."""

    name: str


POSITIVE = Range("must be above 0", lambda value: value > 0)
NOT_NEGATIVE = Range("must not be negative", lambda value: not value < 0)
BELOW_ONE = Range("must be at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Range("must be between 0 and 1", lambda value: 0 <= value <= 1)
VERBATIM = Fact("taken as typed on the command line: no quoting, no Hydra grammar")
MAY_CHANGE = Fact("may differ from the checkpoint's when a run resumes")
YOUNGER = Fact("younger than some checkpoints, which lack it: must match on a resume only if it is set")
RUNS_CODE = Fact("lets somebody else's code run, so a file alone cannot enable it")


def plain(kind: Any) -> Any:
    """Return a setting's type without its facts; the names of a registry (`choices.Names`) are part of the type."""
    if typing.get_origin(kind) is not Annotated:
        return kind
    base, *more = typing.get_args(kind)
    if not isinstance(more[0], Names):
        return base
    words = tuple(each for each in more if not isinstance(each, Range | Fact | ReadBy | FormatOption))
    return Annotated[base, *words]


def facts(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a dotted key and a fact for each fact in the schema, including those of groups."""
    for name, kind in typing.get_type_hints(schema, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            yield from facts(typing.cast(type, kind), f"{prefix}{name}.")
        elif typing.get_origin(kind) is Annotated:
            yield from (
                (f"{prefix}{name}", fact)
                for fact in typing.get_args(kind)[1:]
                if isinstance(fact, Range | Fact | ReadBy | FormatOption)
            )


def value_of(settings: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    return reduce(getattr, key.split("."), settings)


def keys_with(schema: type, fact: Fact) -> frozenset[str]:
    """Return the dotted keys of the settings that have a fact."""
    return frozenset(key for key, stated in facts(schema) if stated == fact)


def mappings(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of the settings that are mappings with arbitrary keys."""
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from mappings(typing.cast(type, kind), f"{prefix}{name}.")
        elif mapping_kind(kind) is not None:
            yield f"{prefix}{name}"


def mapping_kind(*kinds: Any) -> Any:
    """Return the mapping that a setting's type is, or allows beside other types; None if it allows none."""
    alternatives = [one for kind in kinds for one in (kind, *typing.get_args(kind))]
    return next((one for one in alternatives if typing.get_origin(one) is dict), None)
