"""Settings that were saved: a config.yaml, or that of a run's folder, read as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml

from fsdp_qlora.config.convert import build
from fsdp_qlora.errors import ConfigError, SecurityError
from fsdp_qlora.files.bounded import OutOfBoundsError, read_settings


def read_config(file: str, what: str = "run_from") -> dict[str, Any]:
    """Read a config.yaml as data, or that of a run's folder.

    Raises:
        ConfigError: if it is not there, is no mapping, or is more than settings can be.
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
        raise ConfigError(f"{what}: {path} holds more than settings can: {error}.") from error
    except Exception as error:  # of any kind: a date that there is not is a ValueError, a number without digits another
        raise ConfigError(f"{what}: {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: {path} holds no settings.")
    return values


class Saved:
    """Settings that can be read back from the file that a run saved."""

    @classmethod
    def load(cls, path: str | Path, trust_remote_code: bool = False, allow_code: bool = False) -> Self:
        """Read the config.yaml of a run, or of its folder, without Hydra: as data, no resolver runs.

        Whoever wrote the file does not decide what code runs here: what lets code run must be given as an argument.

        Raises:
            ConfigError: if it cannot be read, or is no settings of this version.
            SecurityError: if it lets code run that no argument allows.
        """
        values = read_config(str(path), "config")
        given = {"model.trust_remote_code": trust_remote_code, "data.allow_code": allow_code}
        for key, allowed in given.items():
            group, _, name = key.partition(".")
            inside = values.get(group)
            said = inside.get(name) if isinstance(inside, dict) else None
            if str(said).lower() not in ("none", "false") and not allowed:
                raise SecurityError(
                    f"{key}: set in {path}, which is not enough to run somebody's code. If you trust that code, load "
                    f"the file with {name}=True."
                )
        return build(cls, values)
