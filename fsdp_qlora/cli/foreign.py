"""Folders of settings that others may have written (``--config-dir``): they set our keys and none of Hydra's own.

Hydra's own settings run code: callbacks and loggers are built from names of classes, ``env_set`` changes how Python
imports. An experiment has no need of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fsdp_qlora.errors import SecurityError

TAKEN = ("hydra.sweep.", "hydra.verbose", "hydra/launcher", "hydra.launcher.", "hydra/sweeper", "hydra.sweeper.")
"""Those of Hydra's own settings that the command line takes, by how they begin."""
_NAMES_HYDRA = re.compile(r"(^|[\s/@.:])hydra($|[\s/@.:])")
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)


def refuse_hydras_own(folder: Path) -> None:
    """Check that no file of a folder sets anything of Hydra's own.

    Raises:
        SecurityError: naming the file.
    """
    for file in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
        if why := next(_reaches_hydra(file, file.relative_to(folder)), None):
            raise SecurityError(
                f"--config-dir: {file} {why}. Such settings can run code, so files may not have them; those that you "
                f"need ({', '.join(TAKEN)}) can be given on the command line."
            )


def _reaches_hydra(file: Path, place: Path) -> Iterator[str]:
    if place.parts[0] == "hydra":
        yield "is a group of Hydra's own settings"
    text = file.read_text(encoding="utf-8", errors="replace")
    if any(_NAMES_HYDRA.search(package) for package in _PACKAGE.findall(text)):
        yield "puts itself among Hydra's own settings (@package)"
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:  # not taken by Hydra either, which says where
        return
    if not isinstance(values, dict):
        return
    if any(isinstance(key, str) and _NAMES_HYDRA.search(key) for key in values):
        yield "has a node `hydra`"
    for entry in values.get("defaults") or ():
        if _NAMES_HYDRA.search(_words(entry)):
            yield "names Hydra's own settings in its defaults"


def _words(entry: Any) -> str:
    return " ".join(str(key) for key in entry) if isinstance(entry, dict) else str(entry)


def is_taken(key: str) -> bool:
    """Whether the command line takes this one of Hydra's own settings."""
    return key.startswith(TAKEN) and "_target_" not in key
