"""Where files are kept between runs: in the home folder, if the user has one. Does not import torch.

On clusters and in containers there may be none: ``HOME`` is not a folder, or the user has no entry in passwd.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from fsdp_qlora.errors import ConfigError, StorageError

CACHE_VARIABLE = "FSDP_QLORA_CACHE"
COMPILED_PLACES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables for the compilers' caches, and the folder of each in our cache."""
_PLACES = COMPILED_PLACES | {
    "HF_HOME": "huggingface",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb",
    "WANDB_DATA_DIR": "wandb",
}
"""Environment variables of libraries that would use the home folder, and the folder of each in our cache."""


def home_folder() -> Path | None:
    """Return the user's home folder, or None if there is none."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and _is_folder(home) else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # this user may not look there
        return False


def cache_folder() -> Path:
    """Return the folder for prepared data and the embedded model: $FSDP_QLORA_CACHE or ~/.cache/fsdp_qlora.

    Raises:
        ConfigError: if there is no home folder and the variable does not name another one.
        StorageError: if the folder does not exist and cannot be created.
    """
    named, home = os.environ.get(CACHE_VARIABLE), home_folder()
    if home is None and (not named or named.startswith("~")):
        raise ConfigError(
            f"{CACHE_VARIABLE}: there is no home folder to keep tokenized data and the embedded model in; set it to a "
            "writable folder."
        )
    folder = Path(named).expanduser() if named else Path(home or "") / ".cache" / "fsdp_qlora"
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not (there.is_dir() and (folder == there or os.access(there, os.W_OK | os.X_OK))):
        raise StorageError(
            f"{CACHE_VARIABLE}: {folder} cannot be created, because {there} is not writable; choose another folder."
        )
    return folder


def settle_without_home(env: MutableMapping[str, str]) -> None:
    """Without a home folder, point other libraries to our cache and give the user a name."""
    if home_folder() is not None:
        return
    if named := env.get(CACHE_VARIABLE):
        for variable, place in _PLACES.items():
            env.setdefault(variable, str(Path(named).absolute() / place))
    if not any(env.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        env["USER"] = f"uid{os.getuid()}"  # torch's compiler asks for a user name and fails if passwd has none
