"""Whole-file digests of a model's weights, computed once in the background and cached until a file changes.

A run's checkpoints include them as soon as they are known. At every start,
`fsdp_qlora.load.safetensors.file_digests` reads only samples of each file; they distinguish models, but miss a change
between the samples.
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
    """Known digests of some files, by name; safe to read while more are being computed."""

    def __init__(self, files: Iterable[Path], kept: Path | None) -> None:
        """Load cached digests of these files from the folder ``kept``; None disables the cache."""
        self._files = {file.name: file for file in files}
        self._kept = kept
        self._stop = threading.Event()
        self.known: dict[str, str] = {}
        for name, file in self._files.items():
            if (digest := self._recall(file)) is not None:
                self.known[name] = digest

    def begin(self) -> None:
        """Compute missing digests in the background, one file at a time and at the lowest CPU priority."""
        missing = [name for name in self._files if name not in self.known]
        threading.Thread(target=self._in_background, args=(missing,), name="whole-digests", daemon=True).start()

    def close(self) -> None:
        """Stop the background work; the next run reads an unfinished file again."""
        self._stop.set()

    def _in_background(self, names: list[str]) -> None:
        with suppress(OSError):  # on Linux, this affects only this thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        for name in names:
            with suppress(OSError):  # an unreadable file gets no digest; its weights are already loaded
                self._make(name)

    def make(self, names: Iterable[str]) -> None:
        """Compute the missing digests among ``names`` and wait for them.

        Raises:
            OSError: if a file cannot be read.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._make, [name for name in names if name in self._files and name not in self.known]))

    def missing(self, names: Iterable[str]) -> bool:
        """Whether any of ``names`` is one of our files and has no digest yet."""
        return any(name in self._files and name not in self.known for name in names)

    def compare(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Compare the files with a checkpoint's digests, where both are known.

        Raises:
            ConfigError: naming the first file that differs.
        """
        for name, digest in saved.items():
            if (now := self.known.get(name)) is not None and now != digest:
                raise ConfigError(
                    f"model.name: {self._files[name]} is not the file that {checkpoint} was trained on: its sha256 is "
                    f"{now}, not {str(digest)[:64]}. Use the original model, or choose another run.name."
                )

    def _make(self, name: str) -> None:
        file = self._files[name]
        before, digest = _identity(file), hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                if self._stop.is_set():
                    return
        if _identity(file) == before:  # else it has changed meanwhile
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
            kept = read_json(place, dict[str, int | str])
            return str(kept["sha256"]) if kept == {**_identity(file), "sha256": kept["sha256"]} else None
        except (OSError, ValueError, KeyError, SecurityError):
            return None

    def _keep(self, file: Path, value: dict[str, int | str]) -> None:
        place = self._place(file)
        if place is not None:
            with suppress(OSError):  # the next run reads the file again
                place.parent.mkdir(parents=True, exist_ok=True)
                write_json(place, value)


def _identity(file: Path) -> dict[str, int | str]:
    """Return attributes that change with a file's content; unlike mtime, ctime cannot be set back."""
    now = file.stat()
    return {"size": now.st_size, "mtime_ns": now.st_mtime_ns, "ctime_ns": now.st_ctime_ns, "inode": now.st_ino}
