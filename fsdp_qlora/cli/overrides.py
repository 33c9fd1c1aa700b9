"""Checks each override of the command line on its own: its key, its value's type, its place in Hydra's grammar."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from fsdp_qlora.cli.foreign import TAKEN, is_taken
from fsdp_qlora.cli.quoting import sweep_hint
from fsdp_qlora.config.choices import closest, nearest
from fsdp_qlora.config.convert import convert, field_types, known_keys, no_such_key
from fsdp_qlora.config.facts import mapping_kind, mappings
from fsdp_qlora.config.problems import Problem
from fsdp_qlora.config.schema import RunConfig

_MAPPINGS = tuple(mappings(RunConfig))
"""Settings that are mappings with arbitrary keys."""
GROUPS = [name for name, kind in field_types(RunConfig).items() if dataclasses.is_dataclass(kind)]
EXPERIMENT = "experiment"
SEVERAL = ("track",)
"""Groups of which several options can be chosen at once: their files set different keys."""
_FP16 = (
    " float16 overflows above 65504, which activations of many models trained in bfloat16 exceed, and it would also "
    "need loss scaling. Set precision=bf16, or fp32 on GPUs without bfloat16."
)
REFUSED = {("precision", "fp16"): _FP16}
"""Options that users ask for but that are deliberately missing -> the reason."""


def conf_dir() -> Path:
    """Return the folder of the YAML files: the packaged copy if it exists, else the one in the checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def group_options(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names of a group's YAML files."""
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def mapping_of(key: str) -> str | None:
    """Return the setting with arbitrary keys that ``key`` equals or lies in, or None."""
    return next((name for name in _MAPPINGS if key == name or key.startswith(f"{name}.")), None)


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides, parsed by Hydra; all of them must be valid."""
    return OverridesParser.create().parse_overrides(list(overrides))


def override_problem(text: str, typed: Sequence[str], config_dir: str | None, flags: Sequence[str]) -> Problem | None:
    """Return what is wrong with one override, checked in isolation, or None.

    Args:
        text: the override.
        typed: the keys of all overrides: a wrong group or experiment leaves the values of all other keys unknown.
        config_dir: the user's own folder of settings, if any.
        flags: Hydra's flags.
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        key = text.partition("=")[0].lstrip("+~")
        meant = closest(key, known_keys(RunConfig)) or key
        return Problem(
            f"{text}: cannot be parsed. Quote the value for Hydra: {text.partition('=')[0]}=\"'...'\".",
            frozenset({meant}),
        )
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        message = f"{key}: not accepted; Hydra's own settings are limited to {', '.join(TAKEN)}."
        return None if is_taken(key) else Problem(message)
    if key in GROUPS or key == EXPERIMENT:
        return _wrong_option(override, typed, config_dir, flags)
    if key not in known_keys(RunConfig) and not mapping_of(key):
        return _no_such_override(key, typed)
    message = _wrong_value(override, flags)
    return None if message is None else Problem(message, frozenset({mapping_of(key) or key}))


def _no_such_override(key: str, typed: Sequence[str]) -> Problem:
    problem = no_such_key(key, [*known_keys(RunConfig), EXPERIMENT])
    left_open = (_others(meant, typed) if meant in (*GROUPS, EXPERIMENT) else {meant} for meant in problem.unknown)
    return dataclasses.replace(problem, unknown=frozenset().union(*left_open))


def _wrong_option(
    override: Override, typed: Sequence[str], config_dir: str | None, flags: Sequence[str]
) -> Problem | None:
    key = override.key_or_group
    if override.is_sweep_override():
        hint = sweep_hint(key, override.input_line or "", key in SEVERAL, flags)
        return None if hint is None else Problem(hint, frozenset(_others(key, typed)))
    choice = override.value()
    options = group_options(key, config_dir)
    chosen = choice if isinstance(choice, list) and key in SEVERAL else [] if choice is None else [choice]
    wrong = [str(option) for option in chosen if option not in options]
    if not wrong:
        return None
    word = wrong[0]
    why = REFUSED.get((key, word)) or nearest(word, options)
    return Problem(f"{key}: {word!r} is not one of {', '.join(options)}.{why}", frozenset(_others(key, typed)))


def _others(key: str, typed: Sequence[str]) -> set[str]:
    """Return the keys whose values a group, or an experiment, decides: those that were not typed themselves."""
    inside = "" if key == EXPERIMENT else f"{key}."
    return {k for k in known_keys(RunConfig) if k.startswith(inside) and k not in typed and k not in GROUPS}


def _wrong_value(override: Override, flags: Sequence[str]) -> str | None:
    key = override.key_or_group
    if override.is_delete():
        return f"{key}: a key cannot be deleted; set it to null or to its default."
    if override.is_sweep_override():
        return sweep_hint(key, override.input_line or "", _takes_a_list(key), flags)
    try:
        convert(override.value(), _kind_of(key))
    except ValueError as error:
        return f"{key}: {error}"
    return None


def _takes_a_list(key: str) -> bool:
    kind = _kind_of(key)
    return kind is Any or list in (typing.get_origin(kind), *map(typing.get_origin, typing.get_args(kind)))


def _kind_of(key: str) -> Any:
    kind: Any = RunConfig
    mapping = mapping_of(key)
    for part in (mapping or key).split("."):
        kind = field_types(kind)[part]
    if mapping is None or key == mapping:
        return kind
    return typing.get_args(mapping_kind(kind))[1] if key.count(".") == mapping.count(".") + 1 else Any


def problems_of(
    overrides: Sequence[str], verbatim: Sequence[str], config_dir: str | None, flags: Sequence[str]
) -> Iterator[tuple[str, Problem]]:
    """Yield each wrong override and what is wrong with it; ``verbatim`` are further keys that were typed."""
    typed = [*verbatim, *(text.partition("=")[0].lstrip("+~") for text in overrides)]
    for text in overrides:
        if (problem := override_problem(text, typed, config_dir, flags)) is not None:
            yield text, problem
