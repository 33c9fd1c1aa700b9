"""manifest.json: the run that a checkpoint belongs to, and the digest of each of its files.

Neither DCP nor safetensors notices a flipped bit, so every file has a sha256. It detects accidents, not forgeries.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fsdp_qlora.errors import CheckpointError, ConfigError, SecurityError
from fsdp_qlora.files.read import misfit, parse_json, read_regular, walk
from fsdp_qlora.files.write import write_json
from fsdp_qlora.train.progress import Progress

FORMAT = 1
MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
_SAFE_NAME = re.compile(r"(adapter/(additional_chat_templates/|1_Pooling/)?)?\w[\w.-]*")
_SETTING = re.compile(r"[\w.]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMPLETE_BYTES, _MAX_DIMENSIONS, _MAX_VALUES = 1000, 8, 2**63


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's description."""

    format: int
    step: int
    world_size: int
    progress: dict[str, Any]
    identity: dict[str, Any]
    """Everything that must match for an exact resume, as dotted key -> value."""
    tensors: dict[str, list[int]]
    """Tensor name -> global shape."""
    files: dict[str, dict[str, int | str]]
    """File name -> ``{size, sha256}``."""
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write manifest.json into ``folder``."""
        write_json(folder / MANIFEST, asdict(self))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check a folder's manifest.

        Raises:
            CheckpointError: if it is missing, does not match COMPLETE, or was written in another format.
            SecurityError: if it matches COMPLETE but is not a manifest, or names a file outside the folder.
        """
        file = folder / MANIFEST
        try:
            data, vouched = read_regular(file), read_regular(folder / COMPLETE, _COMPLETE_BYTES).strip()
        except OSError as error:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint: {error.strerror}: {error.filename}"
            ) from error
        if hashlib.sha256(data).hexdigest().encode() != vouched:
            raise CheckpointError(f"{file} is damaged: its sha256 does not match {COMPLETE}.")
        try:
            values = parse_json(data, dict[str, Any])
            if type(other := values.get("format")) is int and other != FORMAT:
                raise CheckpointError(f"{file} has format {other}; this version reads format {FORMAT}.")
            _require_values(values, file)
        except ValueError as error:
            raise SecurityError(f"{file} is not a manifest, though {COMPLETE} vouches for it: {error}.") from error
        for name in values["files"]:
            if not _SAFE_NAME.fullmatch(name):
                raise SecurityError(f"{file} names {name[:200]!r}: only plain file names are allowed.")
        return Manifest(**values)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk: its folder and what its manifest says."""

    folder: Path
    manifest: Manifest


def _require_values(values: dict[str, Any], file: Path) -> None:
    """Raise ValueError unless these are the values of a manifest, each with the right type and within bounds."""
    kinds = get_type_hints(Manifest)
    if odd := sorted(values.keys() ^ kinds.keys()):
        raise ValueError(f"{odd[0][:80]!r} is {'unknown' if odd[0] in values else 'missing'}")
    wrong = next((wrong for name, kind in kinds.items() if (wrong := misfit(values[name], kind, name))), None)
    if wrong is not None:
        raise ValueError(wrong)
    if unknown := sorted(values["progress"].keys() - get_type_hints(Progress).keys()):
        raise CheckpointError(f"{file}: progress.{unknown[0][:80]} is not known to this version.")
    if (wrong := Progress.problem(values["progress"])) is not None:
        raise ValueError(wrong)
    if values["step"] < 0 or values["world_size"] < 1:
        raise ValueError(f"step is {values['step']}, world_size {values['world_size']}")
    for name, shape in values["tensors"].items():
        if len(shape) > _MAX_DIMENSIONS or any(n < 0 for n in shape) or math.prod(shape) >= _MAX_VALUES:
            raise ValueError(f"tensors[{name[:80]!r}] is not the shape of a tensor")
    for name, known in values["files"].items():
        size, digest = known.get("size"), known.get("sha256")
        if len(known) != 2 or not (type(size) is int and size >= 0) or not _SHA256.fullmatch(str(digest)):
            raise ValueError(f"files[{name[:80]!r}] is not a size and a sha256")


def list_files(folder: Path) -> list[str]:
    """Return the paths of the files in a checkpoint, relative to its folder and including subfolders."""
    return sorted(os.path.relpath(f.path, folder) for f in walk(folder) if not f.is_dir(follow_symlinks=False))


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Check that a run has the settings that a checkpoint was made with.

    Raises:
        ConfigError: naming every setting that differs, with both values.
    """
    differ = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if differ:
        lines = [f"{key}: {saved.get(key)!r:.500} in the checkpoint, {now.get(key)!r:.500} now." for key in differ]
        raise ConfigError("\n".join([*lines, _way_out(differ, folder)]))


def _way_out(differ: list[str], folder: Path) -> str:
    """Return what to do about keys that differ; overrides help only if all of them are settings."""
    if all(_SETTING.fullmatch(key) for key in differ):
        return (
            f"{folder} was made with different settings. Restore them, choose another run.name, or resume with the "
            f"new ones on purpose: checkpoint.resume_overrides=[{','.join(differ)}]."
        )
    return (
        f"{folder} was made with a different base model, or with a version that computes this model differently. "
        "Restore what differs, or choose another run.name."
    )
