"""Limits what settings can read: only some harmless environment variables, and nothing from Hydra.

Settings files may come from strangers, and a value such as ``${oc.env:HF_TOKEN}`` could leave the machine inside a URL.
The files of ``run_from`` read nothing: their values are taken literally.
"""

from __future__ import annotations

import os
import re
from typing import Any, NoReturn

from omegaconf import OmegaConf

from fsdp_qlora.errors import ConfigError, FsdpQloraError, SecurityError
from fsdp_qlora.files.home import cache_folder

READABLE_VARIABLE = "FSDP_QLORA_READABLE_ENV"
"""Environment variable that lists, separated by commas, further variables that settings files may read."""
_READABLE = re.compile("HOME|USER|TMPDIR|SCRATCH|WORK|SLURM_(?!JWT)[A-Z0-9_]+")  # SLURM_JWT is a password
_ABSENT = object()
_SHORTEST_SECRET = 4


class Outside:
    """Answers the resolvers of one composition, and remembers what it returned and refused."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}
        self.refusal: FsdpQloraError | None = None

    def register(self) -> None:
        """Replace the resolvers of OmegaConf and Hydra; call it again after Hydra has registered its own."""
        OmegaConf.register_new_resolver("embedded", embedded_path, replace=True)
        OmegaConf.register_new_resolver("oc.env", self._variable, replace=True)
        OmegaConf.register_new_resolver("hydra", self._hydras, replace=True)

    def explained(self, error: Exception) -> FsdpQloraError:
        """Return the error to raise for one of Hydra's or OmegaConf's, without values of variables."""
        if self.refusal is not None:  # Hydra may have wrapped it in another error
            return self.refusal
        if self._given:  # the message can contain any part of their values
            key = getattr(error, "full_key", None) or "the settings"
            return ConfigError(
                f"{key}: invalid value, given what was read from the environment: {', '.join(self._given)}."
            )
        return ConfigError(explain(error))

    def without_values(self, text: str) -> str:
        """Return a message with the values of the variables that were read replaced by their names."""
        for name, value in sorted(self._given.items(), key=lambda item: -len(item[1])):
            if len(value) >= _SHORTEST_SECRET:
                for spelt in (value, repr(value)[1:-1]):
                    text = text.replace(spelt, f"${{oc.env:{name}}}")
        return text

    def _variable(self, name: Any, default: Any = _ABSENT) -> str | None:
        name = str(name)
        more = {word.strip() for word in os.environ.get(READABLE_VARIABLE, "").split(",")}
        if not (_READABLE.fullmatch(name) or name in more):
            self._refuse(
                SecurityError,
                f"${{oc.env:{name}}}: settings files may not read this variable, which may hold a secret. Give the "
                f"value on the command line, or list the variable in {READABLE_VARIABLE} if you trust all these files.",
            )
        value = os.environ.get(name)
        if value is not None:
            self._given[name] = value
            return value
        if default is _ABSENT:
            self._refuse(ConfigError, f"${{oc.env:{name}}}: the variable is not set.")
        return None if default is None else str(default)

    def _hydras(self, path: Any) -> NoReturn:
        self._refuse(
            SecurityError,
            f"${{hydra:{path}}}: settings files may not read Hydra's own values; write the value itself.",
        )

    def _refuse(self, kind: type[FsdpQloraError], message: str) -> NoReturn:
        self.refusal = self.refusal or kind(message)
        raise self.refusal


def embedded_path(name: str) -> str:
    """Return the path of an embedded model or data file, which `prepare` fetches."""
    return str(cache_folder() / "embedded" / name)


def explain(error: Exception) -> str:
    """Return the part of a Hydra or OmegaConf error that helps the user."""
    text = str(error).strip()
    cause = error.__cause__
    if cause is not None and str(cause).strip() not in text:
        text = f"{text} ({str(cause).strip().splitlines()[0]})"
    lines = [part for part in text.splitlines() if "full_key:" in part or "object_type" not in part]
    return " ".join(part.strip() for part in lines if part.strip())
