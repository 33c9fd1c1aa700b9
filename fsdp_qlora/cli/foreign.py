"""Settings that others may have written (``--config-dir``, ``run_from``): they alone let no code run.

They set none of Hydra's own settings, which run code: callbacks and loggers are built from names of classes,
``env_set`` changes how Python imports. And those of ours that let code run count only where they were typed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, SecurityError, first_line
from fsdp_qlora.files.bounded import OutOfBoundsError, read_settings

TAKEN = ("hydra.sweep.", "hydra.verbose", "hydra/launcher", "hydra.launcher.", "hydra/sweeper", "hydra.sweeper.")
"""Those of Hydra's own settings that the command line takes, by how they begin."""
_NAMES_HYDRA = re.compile(r"(^|[\s/@.:])hydra($|[\s/@.:])")
_PACKAGE = re.compile(r"\s*#\s*@package\s+(\S+)")
_ELSEWHERE = re.compile(r"\.\.|//|\$\{|:/")
"""How a file can name others that lie elsewhere; an interpolation can put that together from harmless parts."""


def refuse_hydras_own(folder: Path) -> None:
    """Check that no file of a folder sets anything of Hydra's own.

    Raises:
        SecurityError: naming the file.
        ConfigError: if a file holds more than settings can.
    """
    for place in folder.rglob("*"):
        if place.is_symlink() and place.is_dir():  # Hydra goes there, where nothing has been looked at
            raise SecurityError(f"--config-dir: {place} is a link to a folder; have the files themselves there.")
    for file in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
        if why := next(_reaches_hydra(file, file.relative_to(folder)), None):
            raise SecurityError(
                f"--config-dir: {file} {why}. Such settings can run code, so files may not have them; those that you "
                f"need ({', '.join(TAKEN)}) can be given on the command line."
            )


def _reaches_hydra(file: Path, place: Path) -> Iterator[str]:
    if place.parts[0] == "hydra":
        yield "is a group of Hydra's own settings"
    if file.is_dir() or not file.exists():
        return
    if not file.is_file():
        raise ConfigError(f"--config-dir: {file} is no file.")  # a pipe would be waited for
    try:
        text = read_settings(file)
        packages = [found[1] for line in text.splitlines() if (found := _PACKAGE.match(line))]
        if any(_NAMES_HYDRA.search(package) for package in packages):
            yield "puts itself among Hydra's own settings (@package)"
        # As Hydra reads it, not as YAML's own loader would: that one fails at a tag which Hydra takes.
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except OutOfBoundsError as error:
        raise ConfigError(f"--config-dir: {file} holds more than settings can: {error}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError):  # not taken by Hydra either, which says where
        return
    except Exception as error:  # of any kind: a date that there is not, a number without digits
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
    """Whether the command line takes this one of Hydra's own settings."""
    return key.startswith(TAKEN) and "_target_" not in key


def switches_on(config: RunConfig) -> dict[str, str]:
    """Return the settings that let code run and are on: their keys, and whose code it is."""
    found = {}
    if config.model.trust_remote_code:
        found["model.trust_remote_code"] = f"Python code that comes with the model {config.model.name}"
    if config.data.allow_code:
        found["data.allow_code"] = f"the function data.row_function={config.data.row_function}"
    return found


def require_typed(config: RunConfig, typed: Collection[str], files: str) -> None:
    """Check that what lets code run was typed, not only set in a file.

    Args:
        config: the settings, files and command line together.
        typed: keys of the command line.
        files: what to call the files that are not ours.

    Raises:
        SecurityError: naming what to type.
    """
    untyped = {key: code for key, code in switches_on(config).items() if key not in typed}
    if untyped:
        keys, words = " and ".join(untyped), " ".join(f"{key}=true" for key in untyped)
        raise SecurityError(
            f"{keys}: set in {files}, which is not enough to run {' and '.join(untyped.values())}. If you trust that "
            f"code, add to the command line: {words}"
        )
