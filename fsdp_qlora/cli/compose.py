"""Composes ``conf/`` and the command line into one checked `RunConfig`, before torch is imported.

Overrides are checked one by one first (`fsdp_qlora.cli.overrides`), each with the nearest valid word; then Hydra
composes, and types and rules are checked. If overrides are wrong, the others are still composed and checked, so that
one message names everything. Values of free-text and path keys never pass through Hydra's grammar.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdp_qlora.cli.foreign import refuse_hydras_own, require_typed
from fsdp_qlora.cli.outside import Outside
from fsdp_qlora.cli.overrides import EXPERIMENT, GROUPS, conf_dir, mapping_of, parsed, problems_of
from fsdp_qlora.cli.plan_rules import PLAN_RULES
from fsdp_qlora.cli.quoting import list_of_names, literal, mapping_of_names, quoted
from fsdp_qlora.config.convert import build_partly, field_types, known_keys, no_such_key, words_of
from fsdp_qlora.config.facts import VERBATIM, keys_with
from fsdp_qlora.config.problems import Problem, messages
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.saved import read_config
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.config.verb_rules import missing
from fsdp_qlora.errors import ConfigError, FsdpQloraError
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import visible

_VERBATIM = keys_with(RunConfig, VERBATIM)
"""Keys whose values are taken as typed: no quoting, no Hydra grammar (a list may still be written ``[a,b]``)."""

MULTIRUN = ("--multirun", "-m")
_ABSENT = object()


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
    malformed: list[str]
    """What is wrong with the arguments that are none of these."""


def split(arguments: Sequence[str]) -> CommandLine:
    """Sort the arguments into overrides, verbatim values and flags.

    Raises:
        ConfigError: if there is no folder ``--config-dir``.
    """
    overrides: list[str] = []
    malformed: list[str] = []
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
        elif equals and mapping_of(key.lstrip("+")):
            overrides.append(f"++{argument.lstrip('+')}")  # a plain Hydra override cannot add a key, not even here
        elif equals or argument.startswith("~"):
            overrides.append(argument)
        else:
            malformed.append(f"{argument}: expected key=value (or a flag; see --help).")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir: there is no folder {config_dir}.")
    if config_dir is not None:
        refuse_hydras_own(Path(config_dir))
    return CommandLine(overrides, verbatim, flags, config_dir, malformed)


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
    require_right(verb, line)
    return _compose(verb, line)


def require_right(verb: str, line: CommandLine) -> None:
    """Check each override on its own; if one is wrong, check all that is left as well, to name everything at once.

    Raises:
        ConfigError: naming everything that is wrong with the command line.
    """
    wrong = dict(problems_of(line.overrides, list(line.verbatim), line.config_dir, line.flags))
    said = [*line.malformed, *(problem.message for problem in wrong.values())]
    if not said:
        return
    swept = [text for text in line.overrides if text not in wrong and parsed([text])[0].is_sweep_override()]
    unknown = {key for problem in wrong.values() for key in problem.unknown}
    unknown |= {text.partition("=")[0].lstrip("+~") for text in swept}
    rest = [text for text in line.overrides if text not in wrong and text not in swept]
    try:
        config = _compose(verb, dataclasses.replace(line, overrides=rest), unknown)
        said += missing(verb, config, unknown)
    except ConfigError as error:
        said.append(str(error))
    raise ConfigError("\n".join(said))


def _compose(verb: str, line: CommandLine, unknown: Collection[str] = ()) -> RunConfig:
    """Compose and check the settings, except for rules that need one of the ``unknown`` keys."""
    outside = register()
    saved, line = _start_from(line)
    own = f"file://{Path(line.config_dir).absolute()}" if line.config_dir else ""
    search = [f"hydra.searchpath=[{literal(own)}]"] if own else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose(verb, [*search, *line.overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise outside.explained(error) from error
    return _settle(verb, composed, outside, line, saved, unknown=unknown)


def _settle(
    verb: str, composed: DictConfig, outside: Outside, line: CommandLine, saved: dict[str, Any], below: str = "",
    unknown: Collection[str] = (),
) -> RunConfig:  # fmt: skip
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
    wrong = _strange(saved, line)
    saved = {key: value for key, value in saved.items() if key in known_keys(RunConfig)}
    typed = _typed_overrides(line, settings) if saved else {}
    for key, value in {**saved, **typed, **line.verbatim}.items():
        _set(settings, key, value)
    config, mistyped = build_partly(RunConfig, settings)
    wrong += mistyped
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=config.run.name + below))
    if files := " or ".join(_not_ours(line)):
        require_typed(config, {*line.verbatim, *(each.key_or_group for each in parsed(line.overrides))}, files)
    unknown = {*unknown, *(key for problem in wrong for key in problem.unknown)}
    said = [problem.message for problem in wrong] + failures(config, unknown) + messages(PLAN_RULES, config, unknown)
    if said:
        said += missing(verb, config, unknown)
        raise ConfigError(outside.without_values("\n".join(said)))
    return config


def _not_ours(line: CommandLine) -> Iterator[str]:
    """Yield the settings files that somebody else may have written."""
    if (file := line.verbatim.get("run_from")) is not None:
        yield f"run_from={file}"
    if line.config_dir is not None:
        yield f"--config-dir={line.config_dir}"


def _start_from(line: CommandLine) -> tuple[dict[str, Any], CommandLine]:
    """Return the settings of ``run_from``, without groups that the command line chooses, and the command line."""
    file = line.verbatim.get("run_from")
    if file is None:
        return {}, line
    chosen = {o.partition("=")[0] for o in line.overrides}
    if EXPERIMENT in chosen:
        raise ConfigError("run_from: cannot be combined with experiment=; the earlier run's settings take its place.")
    saved = flatten(read_config(file))
    return {k: v for k, v in saved.items() if k.partition(".")[0] not in chosen}, line


def _strange(saved: dict[str, Any], line: CommandLine) -> list[Problem]:
    """Return the keys of ``run_from`` that do not exist."""
    known = known_keys(RunConfig)
    return [no_such_key(key, known, f"{line.verbatim['run_from']}: ") for key in sorted(saved.keys() - set(known))]


def _typed_overrides(line: CommandLine, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the composed values of the keys on the command line, which win over those of ``run_from``."""
    typed: dict[str, Any] = {}
    for key in {override.key_or_group for override in parsed(line.overrides)} - set(GROUPS):
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
        if isinstance(value, dict) and mapping_of(f"{prefix}{key}") is None:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def is_sweep(line: CommandLine) -> bool:
    """Whether a sweep of our own was asked for: ``--multirun`` alone, without settings of Hydra's own."""
    own = any(text.lstrip("+~").startswith("hydra") for text in line.overrides)
    return bool(line.flags) and set(line.flags) <= set(MULTIRUN) and not own


def hydra_main(verb: str, line: CommandLine, run: Callable[[RunConfig], int]) -> int:
    """Run ``verb`` through Hydra, for its flags (--help, --cfg job, --info, --multirun); return the exit code."""
    require_right(verb, line)
    outside = register()
    saved, line = _start_from(line)
    swept = [override.key_or_group for override in parsed(line.overrides) if override.is_sweep_override()]
    ends: list[int | FsdpQloraError] = []

    def job(composed: DictConfig) -> float | None:
        """Run one job; return what a plugin of Hydra's may want to make small, if there is such a number."""
        try:  # Hydra would turn our errors into a traceback and exit code 1
            config = _settle(verb, composed, outside, line, saved, f"/{_job_name(swept)}" if swept else "")
            ends.append(run(config))
        except FsdpQloraError as error:
            ends.append(error)
            print(f"fsdp-qlora: {visible(str(error))}", file=sys.stderr)
            return None
        folder = RunFolder(config.run.output_root, config.run.name)
        return folder.read_summary().get(config.sweep.metric) if verb == "train" and folder.finished else None

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
    flags = [flag if flag not in MULTIRUN else MULTIRUN[0] for flag in line.flags]
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
