"""Reads saved settings as data, from a config.yaml or a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml

from fsdp_qlora.config.convert import build
from fsdp_qlora.config.facts import RUNS_CODE, keys_with, value_of
from fsdp_qlora.errors import ConfigError, SecurityError
from fsdp_qlora.files.bounded import OutOfBoundsError, read_settings


def read_config(file: str, what: str = "run_from") -> dict[str, Any]:
    """Read a config.yaml as data, given the file or its run folder.

    Raises:
        ConfigError: if it is missing, not YAML, not a mapping, or exceeds the bounds on settings files.
        SecurityError: if it is not a regular file.
    """
    path = Path(file).expanduser()
    path = path / "config.yaml" if path.is_dir() else path
    try:
        values = yaml.safe_load(read_settings(path))
    except SecurityError:
        raise
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error.strerror}.") from error
    except OutOfBoundsError as error:
        raise ConfigError(f"{what}: {path} exceeds the limits for settings: {error}.") from error
    except Exception as error:  # PyYAML leaks other types: an invalid date is a ValueError
        raise ConfigError(f"{what}: {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: {path} holds no settings.")
    return _renamed(values)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the names that keys have now: a run had one tracker, ``track.name``."""
    track = values.get("track")
    if isinstance(track, dict) and isinstance(name := track.get("name"), str):
        values["track"] = {"to": {name: True}, **{key: value for key, value in track.items() if key != "name"}}
    return values


class Saved:
    """Mixin for settings that can be loaded from the file that a run saved."""

    @classmethod
    def load(cls, path: str | Path, trust_remote_code: bool = False, allow_code: bool = False) -> Self:
        """Load a run's config.yaml, given the file or its folder, as plain data: without Hydra or resolvers.

        The author of the file must not decide what code runs here, so permission to run code must come as an argument.

        Raises:
            ConfigError: if it cannot be read or does not hold settings of this version.
            SecurityError: if it enables code that no argument allows.
        """
        settings = build(cls, read_config(str(path), "config"))
        arguments = {"model.trust_remote_code": "trust_remote_code"}
        allowed = {"trust_remote_code": trust_remote_code, "allow_code": allow_code}
        for key in sorted(keys_with(cls, RUNS_CODE)):
            argument = arguments.get(key, "allow_code")
            if value_of(settings, key) and not allowed[argument]:
                raise SecurityError(
                    f"{key}: set in {path}, which is not enough to run somebody's code. If you trust that code, load "
                    f"the file with {argument}=True."
                )
        return settings
