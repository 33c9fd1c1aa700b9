"""manifest.json: what a checkpoint belongs to and the digest of every file in it.

A flipped bit loads silently in DCP and in safetensors alike, so every file has a sha256. It detects accidents, not
forgers.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import CheckpointError, ConfigError, SecurityError

FORMAT = 1
MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
_SAFE_NAME = re.compile(r"(adapter/)?\w[\w.-]*")
_MAX_MANIFEST_BYTES = 50_000_000


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's description."""

    format: int
    step: int
    world_size: int
    progress: dict[str, Any]
    identity: dict[str, Any]
    """Dotted setting -> value of everything that must be the same for a resume to be exact."""
    tensors: dict[str, list[int]]
    """Tensor name -> global shape."""
    files: dict[str, dict[str, Any]]
    """File name -> ``{size, sha256}``."""
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write manifest.json into ``folder``."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check a folder's manifest.

        Raises:
            CheckpointError: if it is missing, not what COMPLETE vouches for, or of another format.
            SecurityError: if it is no manifest at all, or names a file outside the folder.
        """
        file = folder / MANIFEST
        try:
            if file.stat().st_size > _MAX_MANIFEST_BYTES:
                raise SecurityError(f"{file} is larger than any honest manifest.")
            data = file.read_bytes()
            vouched = (folder / COMPLETE).read_text().strip()
        except OSError as error:
            raise CheckpointError(f"{folder} is no complete checkpoint: {error.strerror}: {error.filename}") from error
        if hashlib.sha256(data).hexdigest() != vouched:
            raise CheckpointError(f"{file} is damaged: its sha256 is not the one in {COMPLETE}.")
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise CheckpointError(f"{file} has format {values['format']}; this version reads format {FORMAT}.")
            manifest = Manifest(**values)
            sizes = [number for shape in manifest.tensors.values() for number in shape]
            if not all(isinstance(number, int) and number >= 0 for number in sizes):
                raise ValueError("a shape is not made of sizes")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SecurityError(f"{file} is not a manifest, though {COMPLETE} vouches for it: {error}") from error
        for name in manifest.files:
            _require_plain_file(folder, name)
        return manifest


def _require_plain_file(folder: Path, name: str) -> None:
    if not _SAFE_NAME.fullmatch(name):
        raise SecurityError(f"{folder / MANIFEST} names {name!r}: only plain file names are allowed.")
    file = folder / name
    if file.is_symlink() or file.parent.is_symlink() or (file.exists() and not stat.S_ISREG(file.lstat().st_mode)):
        raise SecurityError(f"{file} is not a regular file.")


def list_files(folder: Path) -> list[str]:
    """Return the names of the files in a checkpoint's folder, those of subfolders with the subfolder's name."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())


def sha256(file: Path) -> str:
    """Return a file's digest."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Check that a run is the one that a checkpoint was made by.

    Raises:
        ConfigError: naming every setting that differs, with both values.
    """
    differ = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if differ:
        lines = [f"{key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now." for key in differ]
        raise ConfigError(
            "\n".join(lines)
            + f"\n{folder} was made with other settings. Set them back, choose another run.name, or go on with the new "
            f"ones on purpose: checkpoint.resume_overrides=[{','.join(d for d in differ if ' ' not in d)}]."
        )
