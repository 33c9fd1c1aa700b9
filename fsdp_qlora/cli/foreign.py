"""Keeps settings that others may have written (``--config-dir``, ``run_from``) from running code.

Such files must not set any of Hydra's own settings, because those can run code: callbacks and loggers are built from
class names, and ``env_set`` changes how Python imports. Our own settings that enable code count only if they were
typed on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdp_qlora.config.facts import RUNS_CODE, facts, value_of
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, SecurityError, first_line
from fsdp_qlora.files.bounded import OutOfBoundsError, read_settings

TAKEN = ("hydra.sweep.", "hydra.verbose", "hydra/launcher", "hydra.launcher.", "hydra/sweeper", "hydra.sweeper.")
"""Prefixes of Hydra's own settings that the command line accepts."""
_NAMES_HYDRA = re.compile(r"(^|[\s/@.:])hydra($|[\s/@.:])")
_PACKAGE = re.compile(r"\s*#\s*@package\s+(\S+)")
_ELSEWHERE = re.compile(r"\.\.|//|\$\{|:/")
"""How a file can refer to files elsewhere; an interpolation can assemble such a path from harmless parts."""


def refuse_hydras_own(folder: Path) -> None:
    """Check that no file in a folder sets Hydra's own settings.

    Raises:
        SecurityError: naming the file.
        ConfigError: if a file cannot be read or exceeds the bounds on settings files.
    """
    for place in folder.rglob("*"):
        if place.is_symlink() and place.is_dir():  # Hydra would follow the link, but rglob does not
            raise SecurityError(f"--config-dir: {place} is a link to a folder; put the files themselves there.")
    for file in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
        if why := next(_reaches_hydra(file, file.relative_to(folder)), None):
            raise SecurityError(
                f"--config-dir: {file} {why}. Such settings can run code, so files may not contain them; those that "
                f"you need ({', '.join(TAKEN)}) can be given on the command line."
            )


def _reaches_hydra(file: Path, place: Path) -> Iterator[str]:
    if place.parts[0] == "hydra":
        yield "is a group of Hydra's own settings"
    if file.is_dir() or not file.exists():
        return
    if not file.is_file():
        raise ConfigError(f"--config-dir: {file} is not a file.")  # reading a pipe would block
    try:
        text = read_settings(file)
        packages = [match[1] for line in text.splitlines() if (match := _PACKAGE.match(line))]
        if any(_NAMES_HYDRA.search(package) for package in packages):
            yield "places itself among Hydra's own settings (@package)"
        # Read it as Hydra does: PyYAML's own loader fails at a tag that Hydra accepts.
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except OutOfBoundsError as error:
        raise ConfigError(f"--config-dir: {file} exceeds the limits for settings: {error}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError):  # Hydra rejects it too, and says where
        return
    except Exception as error:  # PyYAML leaks other types: an invalid date, a number without digits
        raise ConfigError(f"--config-dir: {file} cannot be read: {first_line(error)}.") from error
    if not isinstance(values, dict):
        return
    if any(isinstance(key, str) and _NAMES_HYDRA.search(key) for key in values):
        yield "has a node `hydra`"
    defaults = values.get("defaults") or ()
    for entry in defaults if isinstance(defaults, list | tuple) else (defaults,):
        keys, choices = zip(*entry.items(), strict=True) if isinstance(entry, dict) and entry else ((entry,), ())
        if _NAMES_HYDRA.search(" ".join(map(str, keys))):
            yield "names Hydra's own settings in its defaults"
        if _ELSEWHERE.search(" ".join(map(str, (*keys, *choices)))):
            yield f"names files elsewhere in its defaults ({entry})"


def is_taken(key: str) -> bool:
    """Whether the command line accepts this setting of Hydra's own."""
    return key.startswith(TAKEN) and "_target_" not in key


def switches_on(config: RunConfig) -> dict[str, str]:
    """Return the settings that enable code and are on, as ``{key: description of the code}``."""
    whose = {
        "model.trust_remote_code": f"Python code that comes with the model {config.model.name}",
        "data.allow_code": f"the function data.row_function={config.data.row_function}",
        "export.llama_cpp": f"the converters in {config.export.llama_cpp}",
        "evaluate.task_path": f"the tasks in {config.evaluate.task_path}",
    }
    return {key: whose[key] for key, fact in facts(RunConfig) if fact == RUNS_CODE and value_of(config, key)}


def _spelt(config: RunConfig, key: str) -> str:
    value = value_of(config, key)
    return "true" if value is True else str(value)


def require_typed(config: RunConfig, typed: Collection[str], files: str) -> None:
    """Check that settings that enable code were typed, not only set in a file.

    Args:
        config: the settings from files and command line together.
        typed: keys on the command line.
        files: name of the foreign files, for the message.

    Raises:
        SecurityError: naming what to type.
    """
    untyped = {key: code for key, code in switches_on(config).items() if key not in typed}
    if untyped:
        keys, words = " and ".join(untyped), " ".join(f"{key}={_spelt(config, key)}" for key in untyped)
        raise SecurityError(
            f"{keys}: set in {files}, which is not enough to run {' and '.join(untyped.values())}. If you trust that "
            f"code, add to the command line: {words}"
        )
