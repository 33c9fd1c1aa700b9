"""Composes ``conf/`` and the command line into one checked `RunConfig`, before torch is imported.

Overrides are checked one by one first, so that all misspelt keys and wrong types are reported at once, each with the
nearest valid word; then Hydra composes. Values of free-text and path keys never pass through Hydra's grammar.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdp_qlora.cli.foreign import TAKEN, is_taken, refuse_hydras_own, require_typed
from fsdp_qlora.cli.outside import Outside
from fsdp_qlora.cli.quoting import list_of_names, literal, mapping_of_names, quoted, sweep_hint
from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.convert import convert, field_types, known_keys, words_of
from fsdp_qlora.config.facts import VERBATIM, keys_with, mapping_kind, mappings
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.saved import read_config
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.errors import ConfigError, FsdpQloraError
from fsdp_qlora.shown import visible

_MAPPINGS = tuple(mappings(RunConfig))
"""Settings that are mappings with arbitrary keys."""
_VERBATIM = keys_with(RunConfig, VERBATIM)
"""Keys whose values are taken as typed: no quoting, no Hydra grammar (a list may still be written ``[a,b]``)."""

GROUPS = [name for name, kind in field_types(RunConfig).items() if dataclasses.is_dataclass(kind)]
EXPERIMENT = "experiment"
_ABSENT = object()


def conf_dir() -> Path:
    """Return the folder of the YAML files: the packaged copy if it exists, else the one in the checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def register() -> Outside:
    """Register the schema in Hydra's ConfigStore: groups as ``<group>/schema``, the root as ``run_config``.

    Every override of a frozen dataclass would fail, so Hydra gets unfrozen copies. Returns the object that answers
    resolvers.
    """
    store = ConfigStore.instance()
    twins: dict[str, type] = {}
    for name, kind in field_types(RunConfig).items():
        if dataclasses.is_dataclass(kind):
            twins[name] = _twin(typing.cast(type, kind))
            store.store(group=name, name="schema", node=twins[name])
    store.store(name="run_config", node=_twin(RunConfig, twins))
    outside = Outside()
    outside.register()
    return outside


def _twin(schema: type, groups: dict[str, type] | None = None) -> type:
    fields: list[Any] = []
    for item in dataclasses.fields(schema):
        kind = field_types(schema)[item.name]
        if groups and item.name in groups:
            kind = groups[item.name]
            fields.append((item.name, kind, field(default_factory=kind)))
            continue
        if typing.get_origin(kind) in (typing.Literal, typing.Annotated):
            kind = str
        elif any(words_of(k) or typing.get_origin(k) is dict for k in typing.get_args(kind)):  # `convert` checks it
            kind = Any
        default = item.default_factory if item.default is dataclasses.MISSING else item.default
        is_factory = item.default is dataclasses.MISSING
        fields.append((item.name, kind, field(default_factory=default) if is_factory else field(default=default)))  # type: ignore[arg-type]
    return dataclasses.make_dataclass(schema.__name__, fields)


@dataclass(frozen=True)
class CommandLine:
    """The arguments typed after the verb, sorted."""

    overrides: list[str]
    """``key=value`` in Hydra's grammar."""
    verbatim: dict[str, Any]
    """Free-text and path keys with their values as typed."""
    flags: list[str]
    """Hydra's own flags, except ``--config-dir``."""
    config_dir: str | None


def split(arguments: Sequence[str]) -> CommandLine:
    """Sort the arguments into overrides, verbatim values and flags.

    Raises:
        ConfigError: if an argument is none of these.
    """
    overrides: list[str] = []
    verbatim: dict[str, Any] = {}
    flags: list[str] = []
    config_dir = None
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if key in ("--config-dir", "-cd"):
            config_dir = value if equals else next(rest, None)
        elif argument.startswith("-"):
            flags.append(argument)
            if argument in ("--cfg", "-c", "--package", "-p", "--info", "-i"):
                flags.extend(typing.cast(list[str], [v]) if (v := next(rest, None)) else [])
        elif equals and key.lstrip("+") in _VERBATIM:
            verbatim[key.lstrip("+")] = _verbatim(key.lstrip("+"), value)
        elif equals and _mapping(key.lstrip("+")):
            overrides.append(f"++{argument.lstrip('+')}")  # a plain Hydra override cannot add a key, not even here
        elif equals or argument.startswith("~"):
            overrides.append(argument)
        else:
            raise ConfigError(f"{argument}: expected key=value (or a flag; see --help).")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir: there is no folder {config_dir}.")
    if config_dir is not None:
        refuse_hydras_own(Path(config_dir))
    return CommandLine(overrides, verbatim, flags, config_dir)


def _verbatim(key: str, value: str) -> Any:
    if key in ("data.train", "data.eval") and value.startswith("[") and value.endswith("]"):
        return list_of_names(value)
    if key == "adapter" and (named := mapping_of_names(value)):
        return named
    if value == "null" and key != "prompt":
        return None
    return value


def compose_config(verb: str, arguments: Sequence[str]) -> RunConfig:
    """Return the checked settings for ``verb`` and these arguments.

    Raises:
        ConfigError: naming all wrong keys, values and combinations at once.
    """
    line = split(arguments)
    problems = list(_problems(line))
    if problems:
        raise ConfigError("\n".join(problems))
    outside = register()
    saved, line = _start_from(line)
    own = f"file://{Path(line.config_dir).absolute()}" if line.config_dir else ""
    search = [f"hydra.searchpath=[{literal(own)}]"] if own else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose(verb, [*search, *line.overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise outside.explained(error) from error
    return _settle(composed, outside, line, saved)


def _settle(
    composed: DictConfig, outside: Outside, line: CommandLine, saved: dict[str, Any], below: str = ""
) -> RunConfig:
    """Return the checked settings: Hydra's result, overridden by ``run_from`` and then by the command line.

    ``below`` is appended to ``run.name``: the folder of a job inside that of its sweep.
    """
    outside.register()  # Hydra has since registered its own resolvers
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise outside.explained(error) from error
    assert isinstance(values, dict)
    settings = typing.cast(dict[str, Any], values)
    typed = _typed_overrides(line, settings) if saved else {}
    for key, value in {**saved, **typed, **line.verbatim}.items():
        _set(settings, key, value)
    try:
        config = from_dict(settings)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=config.run.name + below))
        if files := " or ".join(_not_ours(line)):
            require_typed(config, {override.key_or_group for override in _parsed(line)}, files)
        return check(config)
    except ConfigError as error:
        raise ConfigError(outside.without_values(str(error))) from None


def _not_ours(line: CommandLine) -> Iterator[str]:
    """Yield the settings files that somebody else may have written."""
    if (file := line.verbatim.get("run_from")) is not None:
        yield f"run_from={file}"
    if line.config_dir is not None:
        yield f"--config-dir={line.config_dir}"


def _parsed(line: CommandLine) -> list[Override]:
    return OverridesParser.create().parse_overrides(line.overrides)


def _start_from(line: CommandLine) -> tuple[dict[str, Any], CommandLine]:
    """Return the settings of ``run_from``, without groups that the command line chooses, and the command line."""
    file = line.verbatim.get("run_from")
    if file is None:
        return {}, line
    chosen = {o.partition("=")[0] for o in line.overrides}
    if EXPERIMENT in chosen:
        raise ConfigError("run_from: cannot be combined with experiment=; the earlier run's settings take its place.")
    saved = flatten(read_config(file))
    if unknown := sorted(saved.keys() - set(known_keys(RunConfig))):
        raise ConfigError(
            "\n".join(f"{file}: {k}: there is no such key.{nearest(k, known_keys(RunConfig))}" for k in unknown)
        )
    return {k: v for k, v in saved.items() if k.partition(".")[0] not in chosen}, line


def _typed_overrides(line: CommandLine, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the composed values of the keys on the command line, which win over those of ``run_from``."""
    typed: dict[str, Any] = {}
    for key in {override.key_or_group for override in _parsed(line)} - set(GROUPS):
        value: Any = settings
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT:  # Hydra's own settings are absent
            typed[key] = value
    return typed


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested groups as dotted keys; settings that are mappings themselves stay mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _MAPPINGS:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def _problems(line: CommandLine) -> Iterator[str]:
    """Yield the problems of each override, checked in isolation."""
    parser = OverridesParser.create()
    for text in line.overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException:
            yield f"{text}: cannot be parsed. Quote the value for Hydra: {text.partition('=')[0]}=\"'...'\"."
            continue
        yield from _override_problems(parsed, line)


_FP16 = (
    " float16 overflows above 65504, which activations of many models trained in bfloat16 exceed, and it would also "
    "need loss scaling. Set precision=bf16, or fp32 on GPUs without bfloat16."
)
REFUSED = {("precision", "fp16"): _FP16}
"""Options that users ask for but that are deliberately missing -> the reason."""


def _override_problems(parsed: Override, line: CommandLine) -> Iterator[str]:
    key = parsed.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        if not is_taken(key):
            yield f"{key}: not accepted; Hydra's own settings are limited to {', '.join(TAKEN)}."
        return
    if key in GROUPS or key == EXPERIMENT:
        options = group_options(key, line.config_dir)
        choices = [parsed.value()] if not parsed.is_sweep_override() else []
        for choice in choices:
            if choice is not None and choice not in options:
                word = str(choice)
                why = REFUSED.get((key, word)) or nearest(word, options)
                yield f"{key}: {word!r} is not one of {', '.join(options)}.{why}"
        return
    if key not in known_keys(RunConfig) and not _mapping(key):
        yield f"{key}: there is no such key.{nearest(key, [*known_keys(RunConfig), EXPERIMENT])}"
        return
    if parsed.is_delete():
        yield f"{key}: a key cannot be deleted; set it to null or to its default."
    elif parsed.is_sweep_override():
        if hint := sweep_hint(key, parsed.input_line or "", _takes_a_list(key), line.flags):
            yield hint
    else:
        try:
            convert(parsed.value(), _kind_of(key))
        except ValueError as error:
            yield f"{key}: {error}"


def _takes_a_list(key: str) -> bool:
    kind = _kind_of(key)
    return kind is Any or list in (typing.get_origin(kind), *map(typing.get_origin, typing.get_args(kind)))


def _mapping(key: str) -> str | None:
    """Return the setting in `_MAPPINGS` that ``key`` equals or lies in, or None."""
    return next((name for name in _MAPPINGS if key == name or key.startswith(f"{name}.")), None)


def _kind_of(key: str) -> Any:
    kind: Any = RunConfig
    mapping = _mapping(key)
    for part in (mapping or key).split("."):
        kind = field_types(kind)[part]
    if mapping is None or key == mapping:
        return kind
    return typing.get_args(mapping_kind(kind))[1] if key.count(".") == mapping.count(".") + 1 else Any


def group_options(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names of a group's YAML files."""
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def hydra_main(verb: str, line: CommandLine, run: Callable[[RunConfig], int]) -> int:
    """Run ``verb`` through Hydra, for its flags (--help, --cfg job, --info, --multirun); return the exit code."""
    if problems := list(_problems(line)):
        raise ConfigError("\n".join(problems))
    outside = register()
    saved, line = _start_from(line)
    swept = [override.key_or_group for override in _parsed(line) if override.is_sweep_override()]
    ends: list[int | FsdpQloraError] = []

    def job(composed: DictConfig) -> None:
        try:  # Hydra would turn our errors into a traceback and exit code 1
            ends.append(run(_settle(composed, outside, line, saved, f"/{_job_name(swept)}" if swept else "")))
        except FsdpQloraError as error:
            ends.append(error)
            print(f"fsdp-qlora: {visible(str(error))}", file=sys.stderr)

    shown = [f"{key}={quoted(value)}" for key, value in line.verbatim.items()]
    extra = [f"--config-dir={Path(line.config_dir).absolute()}"] if line.config_dir else []
    keep_tree_clean = [
        "hydra.output_subdir=null",
        "hydra.run.dir=.",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    if swept:  # puts Hydra's own record of the sweep next to its jobs
        keep_tree_clean += ["hydra.sweep.dir=${run.output_root}/${run.name}", "hydra.sweep.subdir=."]
    flags = [flag if flag != "-m" else "--multirun" for flag in line.flags]
    sys.argv = [f"fsdp-qlora {verb}", *flags, *extra, *line.overrides, *shown, *keep_tree_clean]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)(job)()
    except (SystemExit, HydraException, OmegaConfBaseException):
        if outside.refusal is not None:  # Hydra itself reads settings before a sweep and for --resolve
            raise outside.refusal from None
        raise
    return max((end if isinstance(end, int) else end.exit_code for end in ends), default=0)


def _job_name(swept: list[str]) -> str:
    """Return a folder name for one job of a sweep, made of its swept overrides."""
    chosen = [text for text in HydraConfig.get().overrides.task if text.lstrip("+").partition("=")[0] in swept]
    return re.sub(r"[^\w.=,+-]", "_", ",".join(chosen))
