"""Where compiled code is cached between runs: a folder that nobody else can write. Imports no torch.

By default torch uses ``torchinductor_<user>`` in the machine's temporary folder, whoever created it, unpickles its
entries and loads its libraries. Another user of the machine who creates it first can therefore run code as this one.
"""

from __future__ import annotations

import atexit
import os
import stat
from collections.abc import MutableMapping
from contextlib import ExitStack
from pathlib import Path

from fsdp_qlora.errors import ConfigError, SecurityError, StorageError
from fsdp_qlora.files.home import COMPILED_PLACES, cache_folder
from fsdp_qlora.files.scratch import scratch_folder


def settle_compile_caches(env: MutableMapping[str, str]) -> None:
    """Point torch's and Triton's compilers to private folders in ``env``; call it before anything is compiled.

    A folder already named in ``env`` is kept if only this user can write it.

    Raises:
        SecurityError: if somebody else could put code into a folder.
        StorageError: if a folder cannot be created.
    """
    for variable, name in COMPILED_PLACES.items():
        named = env.get(variable)
        folder = Path(named) if named else _private_place() / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not named and not folder.is_symlink() and folder.stat().st_uid == os.geteuid():
                folder.chmod(0o700)
        except OSError as error:
            raise StorageError(f"{variable}: {folder} cannot be used: {error.strerror}.") from error
        if why := who_else_writes(folder):
            raise SecurityError(
                f"{variable}: {folder} holds code that would be run, and {why}. Set it to a folder that only you can "
                "write to."
            )
        env[variable] = str(folder)


def _private_place() -> Path:
    try:
        return cache_folder()
    except (ConfigError, StorageError):  # no writable home folder: use one for this process and its children only
        stack = ExitStack()
        atexit.register(stack.close)
        return stack.enter_context(scratch_folder("fsdp_qlora-compiled-"))


def who_else_writes(folder: Path) -> str | None:
    """Return who besides this user and root could write into ``folder`` or replace it, or None."""
    trusted = {0, os.geteuid()}
    resolved = folder.resolve()
    for place in (resolved, *resolved.parents):
        status = place.stat()
        if status.st_uid not in trusted:
            return f"{place} belongs to another user (uid {status.st_uid})"
        if place == resolved and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others can write to {place} (mode {stat.S_IMODE(status.st_mode):o})"
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"everybody can write to {place}"
    return None
