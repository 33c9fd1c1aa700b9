"""Converts plain dictionaries to settings dataclasses and back, checks every type and reports all errors at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from fsdp_qlora.config.choices import closest, nearest
from fsdp_qlora.config.facts import mapping_kind, plain
from fsdp_qlora.config.problems import Problem
from fsdp_qlora.errors import ConfigError

T = typing.TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the settings as nested plain dictionaries, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def field_types(schema: type) -> dict[str, Any]:
    """Return the fields of a group as ``{name: type}``, in declaration order."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {f.name: plain(hints[f.name]) for f in dataclasses.fields(schema)}


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Return all dotted keys of the schema, including those of groups."""
    keys: list[str] = []
    for name, kind in field_types(schema).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(typing.cast(type, kind), f"{prefix}{name}.")
    return keys


def build(schema: type[T], values: Mapping[str, Any]) -> T:
    """Build a schema from nested dictionaries; missing keys take their defaults.

    Raises:
        ConfigError: naming all unknown keys and all values of the wrong type.
    """
    built, problems = build_partly(schema, values)
    if problems:
        raise ConfigError("\n".join(problem.message for problem in problems))
    return built


def build_partly(schema: type[T], values: Mapping[str, Any]) -> tuple[T, list[Problem]]:
    """Build as `build` does; return problems instead of raising, where keys with a wrong value have their defaults."""
    problems: list[Problem] = []
    return _build(schema, values, "", problems, known_keys(schema)), problems


def _build(schema: type, values: Mapping[str, Any], prefix: str, problems: list[Problem], known: list[str]) -> Any:
    kinds = field_types(schema)
    for name in values.keys() - kinds.keys():
        key = f"{prefix}{name}"
        problems.append(no_such_key(key, known))
    given: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in values:
            continue
        key, value = f"{prefix}{name}", values[name]
        if dataclasses.is_dataclass(kind):
            if isinstance(value, Mapping):
                given[name] = _build(typing.cast(type, kind), value, f"{key}.", problems, known)
            else:
                problems.append(Problem(f"{key}: is a group of keys, not a value; got {value!r}.", frozenset({key})))
            continue
        try:
            given[name] = convert(value, kind)
        except ValueError as error:
            problems.append(Problem(f"{key}: {error}", frozenset({key})))
    return schema(**given)


def no_such_key(key: str, known: Iterable[str], where: str = "") -> Problem:
    """Return what is wrong with a key that does not exist; the one that was probably meant has no known value then."""
    close = closest(key, known)
    return Problem(f"{where}{key}: there is no such key.{nearest(key, known)}", frozenset(filter(None, [close])))


def convert(value: Any, kind: Any) -> Any:
    """Return ``value`` converted to ``kind`` (a field's type).

    Raises:
        ValueError: saying what was expected.
    """
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if words := words_of(kind):
        return _choice(value, words)
    if origin is types.UnionType or origin is typing.Union:
        return _one_of(value, typing.get_args(kind))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"expected a list, got {value!r}.")
        return [convert(item, typing.get_args(kind)[0]) for item in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping {{name: value}}, got {value!r}.")
        return {str(key): convert(item, typing.get_args(kind)[1]) for key, item in value.items()}
    return _scalar(value, kind)


def _one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Convert to the only type among ``kinds``, or keep None or one of the words that they allow.

    Beside that type, a mapping may be one of them.
    """
    words = tuple(word for kind in kinds for word in words_of(kind))
    if (value is None and type(None) in kinds) or value in words:
        return value
    if isinstance(value, Mapping) and (mapping := mapping_kind(*kinds)) is not None:
        return convert(value, mapping)
    (kind,) = (k for k in kinds if k is not type(None) and not words_of(k) and typing.get_origin(k) is not dict)
    try:
        return convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{error} It may also be {' or '.join(words)}.") if words else error from None


def words_of(kind: Any) -> tuple[str, ...]:
    """Return the words that a setting accepts: a literal's, or a registry's names plus additional words, or none."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) is not Annotated:
        return ()
    _, names, *words = typing.get_args(kind)
    return (*names, *words)


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    text = str(value)
    if text in ("True", "False"):  # YAML and Hydra parse true and false as booleans
        text = text.lower()
    if value is None and "none" in choices:
        text = "none"
    if text not in choices:
        raise ValueError(f"{text!r} is not one of {', '.join(choices)}.{nearest(text, choices)}")
    return text


def _scalar(value: Any, kind: type) -> Any:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    wrong = ValueError(f"expected {words[kind]}, got {value!r}.")
    if kind is str:
        if value is None or isinstance(value, (list, dict)):
            raise wrong
        return str(value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise wrong
    if isinstance(value, bool) or value is None or isinstance(value, (list, dict)):
        raise wrong
    try:
        number = kind(value)
    except (TypeError, ValueError):
        raise wrong from None
    if kind is int and isinstance(value, float) and value != number:
        raise wrong
    return number
