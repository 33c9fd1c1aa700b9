"""Size checks for untrusted files before they are loaded: a small file can expand beyond any machine's memory.

A YAML alias stands for everything it refers to, so ten lines can expand to a billion values; a single number in a
model's config decides how many layers are built.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fsdp_qlora.files.read import read_regular

_MOST_CHARACTERS, _MOST_VALUES, _DEEPEST, _LONGEST_NUMBER = 2 << 20, 30_000, 40, 1_000
_LARGEST_CONFIG = 16 << 20
_MOST = {
    r"(layers?|blocks|depths?|stages|groups|codebooks)$": 1_024,
    r"experts($|_per_)": 16_384,
    r"heads$": 65_536,
    r"labels$": 1 << 20,
    r"(positions|position_embeddings|ctx|seq_len|seq_length|sequence_length|window|dim|sizes?)$": 1 << 25,
}
"""Upper bounds on config values, by how the key ends; about five times what the largest known models have."""


class OutOfBoundsError(ValueError):
    """A file exceeds a bound, by itself or once expanded; the message names the bound."""


def read_settings(file: Path) -> str:
    """Return the text of a YAML file after checking that it is small, even with its aliases expanded.

    Raises:
        OutOfBoundsError: if it is not.
        SecurityError: if it is not a regular file, or far too large.
        OSError, UnicodeDecodeError: if it cannot be read.
        yaml.YAMLError: if it is not valid YAML.
    """
    # The user may name a link; its target must be a regular file of a sane size.
    text = read_regular(Path(os.path.realpath(file)), 4 * _MOST_CHARACTERS).decode("utf-8")
    if len(text) > _MOST_CHARACTERS:
        raise OutOfBoundsError(f"it is longer than {_MOST_CHARACTERS} characters")
    values, characters = 0, 0
    sizes: dict[str, tuple[int, int]] = {}
    inside: list[tuple[str | None, int, int]] = []  # open collections: anchor, and the counts where it started
    for event in yaml.parse(text, yaml.SafeLoader):  # only parses: no values are built
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, *_ in inside):
                raise OutOfBoundsError(f"the alias *{event.anchor} refers to a value that contains it")
            more = sizes.get(event.anchor, (0, 0))
            values, characters = values + more[0], characters + more[1]
        elif isinstance(event, yaml.ScalarEvent):
            _require_short_number(event)
            values, characters = values + 1, characters + len(event.value)
            if event.anchor:
                sizes[event.anchor] = (1, len(event.value))
        elif isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, values, characters))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values_before, characters_before = inside.pop()
            if anchor:
                sizes[anchor] = (values - values_before, characters - characters_before)
        if values > _MOST_VALUES or characters > _MOST_CHARACTERS:
            raise OutOfBoundsError(
                f"with its aliases expanded it has more than {_MOST_VALUES} values or {_MOST_CHARACTERS} characters"
            )
        if len(inside) > _DEEPEST:
            raise OutOfBoundsError(f"it is nested more than {_DEEPEST} levels deep")
    return text


def _require_short_number(event: yaml.ScalarEvent) -> None:
    """Reject a long number: YAML reads 1:1:1 in base 60, in time quadratic in its length."""
    plain = event.style is None or event.tag is not None
    if plain and len(event.value) > _LONGEST_NUMBER and event.value[0] in "+-.0123456789":
        raise OutOfBoundsError(f"it has a number of {len(event.value)} characters")


def require_bounded_config(source: Path) -> None:
    """Check a model's config.json, or the folder containing it, for implausible sizes; a missing file passes.

    Raises:
        OutOfBoundsError: if a value is too large, naming the key; or the file is too large or nested too deeply.
    """
    file = source if source.is_file() else source / "config.json"
    if not file.is_file():
        return
    with file.open("rb") as stream:
        text = stream.read(_LARGEST_CONFIG + 1)
    if len(text) > _LARGEST_CONFIG:
        raise OutOfBoundsError(f"config.json is larger than {_LARGEST_CONFIG >> 20} MiB")
    try:
        require_bounded_values(json.loads(text))
    except RecursionError:
        raise OutOfBoundsError("config.json is nested too deeply") from None
    except OutOfBoundsError:
        raise
    except ValueError:  # invalid JSON: transformers reports it
        return


def require_bounded_values(config: Any) -> None:
    """Check a model's config, given as a mapping, in the same way."""
    for key, number in _numbers(config, ""):
        most = next((most for ending, most in _MOST.items() if re.search(ending, key)), None)
        if most is not None and number > most:
            raise OutOfBoundsError(f"{key} in its config is {min(number, 1e300):.6g}, but the limit is {most}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
