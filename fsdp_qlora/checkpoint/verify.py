"""Verifies that a checkpoint is intact, and that it contains only what we write.

These are two separate failures. A file that differs from its digest is *damaged* (exit 65, and `resume=auto` takes the
previous checkpoint). A file that matches its digest but is of a kind that we never write was *crafted*, and is rejected
(exit 77).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fsdp_qlora.checkpoint.manifest import COMPLETE, MANIFEST, Manifest, list_files
from fsdp_qlora.errors import CheckpointError, SecurityError
from fsdp_qlora.files.read import file_sha256, misfit, parse_json, read_regular, refuse_irregular

ADAPTER_FOLDER = "adapter"
_ADAPTER_SUFFIXES = (".safetensors", ".json", ".md", ".jinja", ".txt", ".model")
_SHARDING_INFO = "DCP_SHARDING_INFO"
_PLACES = dict[str, dict[str, Any]] | None
_MAX_JSON_BYTES = 200_000_000


def verify(folder: Path, manifest: Manifest) -> None:
    """Check size and digest of every file, then that each is of a kind we write and agrees with the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, unexpected or damaged.
        SecurityError: naming the first file that our saves never write.
    """
    refuse_irregular(folder)
    present = set(list_files(folder)) - {MANIFEST, COMPLETE}
    if extra := sorted(present - manifest.files.keys()):
        raise CheckpointError(f"{folder / extra[0]} is not in the manifest.")
    for name, known in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != known["size"] or file_sha256(file, follow=False) != known["sha256"]:
            raise CheckpointError(f"{file} is damaged: its content has changed since it was written.")
    covered = dict.fromkeys(manifest.tensors, 0)
    for name in manifest.files:
        _require_kind(folder / name, name)
        if name.endswith(".safetensors") and not name.startswith(ADAPTER_FOLDER):
            _count(folder / name, manifest, covered)
    for name, shape in manifest.tensors.items():
        if covered[name] != math.prod(shape):
            raise SecurityError(f"{folder}: the files hold {covered[name]} values of {name}, whose shape is {shape}.")


def _require_kind(file: Path, name: str) -> None:
    """Reject anything but safetensors and text of the kinds that we write; no tensor is loaded."""
    inside = name.startswith(f"{ADAPTER_FOLDER}/")
    if not name.endswith(_ADAPTER_SUFFIXES if inside else ".safetensors"):
        raise SecurityError(f"{file} is not a file that our checkpoints contain.")
    if name.endswith(".safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise SecurityError(f"{file} is not safetensors, though the manifest vouches for it: {error}.") from error
    elif name.endswith(".json"):
        try:
            json.loads(read_regular(file, _MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise SecurityError(f"{file} is not JSON, though the manifest vouches for it: {error}.") from error


def _count(file: Path, manifest: Manifest, covered: dict[str, int]) -> None:
    """Add a shard file's number of values per tensor to ``covered``; reject shards that lie outside their tensor."""
    with safe_open(file, framework="pt") as opened:
        try:
            places = parse_json((opened.metadata() or {}).get(_SHARDING_INFO, "null").encode(), _PLACES)
            for name in opened.keys():  # noqa: SIM118 (safe_open is not a mapping)
                shape, whole = opened.get_slice(name).get_shape(), manifest.tensors[name]
                offsets = places[name]["saved_offsets"] if places is not None else [0] * len(shape)
                if (wrong := misfit(offsets, list[int], f"the offsets of {name}")) is not None:
                    raise ValueError(wrong)
                inside = all(o >= 0 and o + n <= w for o, n, w in zip(offsets, shape, whole, strict=True))
                if not inside:
                    raise ValueError(f"{name} has shape {shape} at {offsets} in {whole}")
                covered[name] += math.prod(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise SecurityError(f"{file} does not match the manifest: {error}.") from error
