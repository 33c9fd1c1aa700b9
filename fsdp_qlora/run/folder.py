"""The run folder: a kernel-held lock, config.yaml, versions.json, exit.json and summary.json.

Layout and exit codes: README.md, "What a run leaves behind".
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fsdp_qlora.errors import RunFolderError, SecurityError, StorageError
from fsdp_qlora.files.read import LACKING, open_regular, read_json, read_regular, refuse_irregular, warn_of_others
from fsdp_qlora.files.scratch import sweep
from fsdp_qlora.files.write import write_first, write_json, write_text
from fsdp_qlora.track.lines import read_lines, write_lines

_log = logging.getLogger(__name__)
_WANDB = "wandb"
"""W&B's own folder inside the run folder, which contains a link to W&B's newest run."""
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "fsdp-qlora")


class RunFolder:
    """``<output_root>/<name>`` and the files in it."""

    def __init__(self, output_root: str, name: str) -> None:
        self.path = Path(output_root).expanduser().absolute() / name
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.answers_file = self.path / "answers.jsonl"
        self.messages_file = self.path / "messages.jsonl"
        self.exit_file = self.path / "exit.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self._lock: int | None = None
        self._holder = self.path / ".lock.holder"

    def create(self) -> None:
        """Create the folder.

        Raises:
            StorageError: if it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"run.output_root: {self.path} cannot be created: {error.strerror}.") from error

    def lock(self, flock: Callable[[int, int], None] = fcntl.flock) -> None:
        """Lock the folder for this process until it ends; the kernel releases it even after kill -9.

        Half-written files of a killed process are removed.

        Raises:
            RunFolderError: if another process holds it, naming that process.
            SecurityError: if it contains links or pipes, through which writes would go elsewhere. Nothing was written.
            StorageError: if it cannot be read, written or locked.
        """
        try:
            handle = open_regular(self.path / ".lock", os.O_RDWR | os.O_CREAT, changes=False)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror}.") from error
        try:
            locked = self._flock(handle, flock)
            refuse_irregular(self.path, may_link=True, apart=_WANDB)
            # Not into the lock file itself, which may be a hard link to a file elsewhere (a backup, an attack).
            write_text(self._holder, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError):
                raise StorageError(f"{error.filename or self.path} cannot be used: {error.strerror}.") from error
            raise
        self._lock = handle
        for folder in (self.path, self.checkpoints) if locked else ():
            sweep(folder)
        warn_of_others(self.path, *([self.checkpoints] if self.checkpoints.is_dir() else []))

    def _flock(self, handle: int, flock: Callable[[int, int], None]) -> bool:
        """Lock the file or raise; return False with a warning if the file system has no locks."""
        try:
            flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = "another process"
            with suppress(OSError, SecurityError):
                holder = read_regular(self._holder, 4096).decode(errors="replace").strip() or holder
            raise RunFolderError(
                f"run.name: {self.path} is in use by {holder}. Wait for it, stop it, or choose another run.name."
            ) from None
        except OSError as error:
            if error.errno not in LACKING:
                raise StorageError(f"{self.path} cannot be locked: {error.strerror}.") from error
            _log.warning(
                f"run.output_root: this file system does not support locks ({error.strerror}); make sure yourself "
                f"that no second run uses {self.path}."
            )
            return False
        return True

    def unlock(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def finished(self) -> bool:
        """Whether the folder holds a run that ran to its end."""
        return self.summary_file.is_file()

    @property
    def started(self) -> bool:
        """Whether the folder holds a run that was started."""
        return self.config_file.is_file()

    def move_away(self) -> Path:
        """Rename the folder to the next free ``<name>.N`` and lock a new, empty one; return the new path of the old."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(target)
        self.unlock()
        self.create()
        self.lock()
        return target

    def begin(self, config: dict[str, Any]) -> None:
        """Write the resolved settings and the package versions; a finished run is reopened."""
        self.summary_file.unlink(missing_ok=True)
        write_text(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        write_json(self.path / "versions.json", versions())

    def write_start(self, start: dict[str, Any]) -> None:
        """Record what is known before the first step (`fsdp_qlora.run.started`)."""
        write_json(self.path / "start.json", start)

    def write_ranks(self, states: list[dict[str, Any]]) -> None:
        """Record what each rank is doing (`fsdp_qlora.distributed.watch.Watch.states`)."""
        write_json(self.path / "ranks.json", {"time": time.time(), "ranks": states})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary; the run then counts as finished."""
        write_json(self.summary_file, summary)

    def read_summary(self) -> dict[str, Any]:
        """Return what `write_summary` wrote."""
        try:
            return read_json(self.summary_file, dict[str, Any])
        except ValueError as error:
            raise RunFolderError(f"{self.summary_file} is damaged: {error}. Remove it to run again.") from error

    @property
    def bad_rows(self) -> Path:
        """The file that lists skipped rows of the data, if there are any."""
        return self.path / "bad_rows.jsonl"

    def add_answers(self, step: int, answers: list[dict[str, str]]) -> None:
        """Append the answers of an evaluation to answers.jsonl, replacing those of this step and later ones."""
        file = self.answers_file
        kept = [line for line in (read_lines(file) if file.is_file() else []) if line["step"] < step]
        write_lines(file, [*kept, *({"step": step, **answer} for answer in answers)])

    def clear_exit(self) -> None:
        """Remove the record of how the last start ended."""
        self.exit_file.unlink(missing_ok=True)

    def write_exit(self, code: int, rank: int, message: str = "") -> bool:
        """Record how this start ended unless another rank already has; return whether it was written."""
        body = {"code": code, "rank": rank, "message": message, "time": time.time()}
        try:
            return write_first(self.exit_file, json.dumps(body) + "\n")  # the first failure stays
        except OSError:
            return False

    def read_exit(self) -> dict[str, Any] | None:
        """Return what `write_exit` wrote, or None if there is no valid record."""
        try:
            ending = read_json(self.exit_file, dict[str, Any])
        except (OSError, ValueError, SecurityError):
            return None
        kinds = {"code": int, "rank": int, "message": str, "time": int | float}
        return ending if all(isinstance(ending.get(key), kind) for key, kind in kinds.items()) else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed
