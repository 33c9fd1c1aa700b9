"""Whole digests of a model's weight files: read once, in the background, and kept for as long as a file stays as it is.

A run's checkpoints hold them as soon as they are known. `fsdp_qlora.load.safetensors.file_digests` reads samples of
each file, at every start; it tells one model from another, and not one that was changed in between its samples.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import ConfigError, SecurityError
from fsdp_qlora.files.read import read_json
from fsdp_qlora.files.write import write_json

_THREADS, _BLOCK_BYTES = 4, 1 << 22
_NICE = 19


class WholeDigests:
    """Digests of some files by their names, as far as they are known; safe to ask while they are made."""

    def __init__(self, files: Iterable[Path], kept: Path | None) -> None:
        """Take what is kept of these files in the folder ``kept``; None keeps nothing."""
        self._files = {file.name: file for file in files}
        self._kept = kept
        self._stop = threading.Event()
        self.known: dict[str, str] = {}
        for name, file in self._files.items():
            if (digest := self._recall(file)) is not None:
                self.known[name] = digest

    def begin(self) -> None:
        """Make those that are missing in the background, one file at a time and behind all else the CPU has to do."""
        missing = [name for name in self._files if name not in self.known]
        threading.Thread(target=self._in_background, args=(missing,), name="whole-digests", daemon=True).start()

    def close(self) -> None:
        """Leave off; what is half read is read again by the next run."""
        self._stop.set()

    def _in_background(self, names: list[str]) -> None:
        with suppress(OSError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        for name in names:
            with suppress(OSError):  # a file that cannot be read has no digest; the run has its weights
                self._make(name)

    def make(self, names: Iterable[str]) -> None:
        """Make those of ``names`` that are missing, and wait for it.

        Raises:
            OSError: if a file cannot be read.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._make, [name for name in names if name in self._files and name not in self.known]))

    def missing(self, names: Iterable[str]) -> bool:
        """Whether some of ``names`` are of our files and have no digest yet."""
        return any(name in self._files and name not in self.known for name in names)

    def compare(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Check that files are those that a checkpoint was made on, where both digests are known.

        Raises:
            ConfigError: naming the first that is not.
        """
        for name, digest in saved.items():
            if (now := self.known.get(name)) is not None and now != digest:
                raise ConfigError(
                    f"model.name: {self._files[name]} is not the file that {checkpoint} was trained on: its sha256 is "
                    f"{now}, not {str(digest)[:64]}. Give the model as it was, or choose another run.name."
                )

    def _make(self, name: str) -> None:
        file = self._files[name]
        before, digest = _identity(file), hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                if self._stop.is_set():
                    return
        if _identity(file) == before:  # else it was written meanwhile
            self._keep(file, {**before, "sha256": digest.hexdigest()})
            self.known[name] = digest.hexdigest()

    def _place(self, file: Path) -> Path | None:
        path = os.path.realpath(file)
        return self._kept / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:40]}.json" if self._kept else None

    def _recall(self, file: Path) -> str | None:
        place = self._place(file)
        if place is None:
            return None
        try:
            found = read_json(place, dict[str, int | str])
            return str(found["sha256"]) if found == {**_identity(file), "sha256": found["sha256"]} else None
        except (OSError, ValueError, KeyError, SecurityError):
            return None

    def _keep(self, file: Path, value: dict[str, int | str]) -> None:
        place = self._place(file)
        if place is not None:
            with suppress(OSError):  # the next run reads the file again
                place.parent.mkdir(parents=True, exist_ok=True)
                write_json(place, value)


def _identity(file: Path) -> dict[str, int | str]:
    """Return what changes with a file's content; the time of its last change cannot be set back, unlike mtime."""
    found = file.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino}
