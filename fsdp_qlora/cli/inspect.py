"""`inspect PATH`: shows a checkpoint's contents; `inspect A B`: shows where two checkpoints differ."""

from __future__ import annotations

from math import prod
from pathlib import Path

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.differences import contrast
from fsdp_qlora.checkpoint.manifest import SavedCheckpoint
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.cli.tables import print_table
from fsdp_qlora.errors import CheckpointError, ConfigError
from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import megabytes

_SHOWN = 20


def run(paths: list[str]) -> int:
    """Show or compare checkpoints; return 0, or 1 if two differ."""
    if not 1 <= len(paths) <= 2 or any(p.startswith("-") for p in paths):
        raise ConfigError("usage: fsdp-qlora inspect PATH [PATH]   (a checkpoint, or a run folder for its newest one)")
    opened = [open_checkpoint(_checkpoint(Path(path).expanduser())) for path in paths]
    return _show(opened[0]) if len(opened) == 1 else _compare(*opened)


def _checkpoint(path: Path) -> Path:
    """Return the checkpoint at ``path``, or the newest complete one of a run folder."""
    if (path / "checkpoints").is_dir():
        if not (complete := complete_checkpoints(path / "checkpoints")):
            raise CheckpointError(f"{path} holds no complete checkpoint.")
        return complete[-1]
    return path


def _show(saved: SavedCheckpoint) -> int:
    manifest = saved.manifest
    values = sum(prod(shape) for shape in manifest.tensors.values())
    size = sum(int(file["size"]) for file in manifest.files.values())
    rows = [
        ("step", str(manifest.step)),
        ("saved by", f"{manifest.world_size} rank(s)"),
        ("files", f"{len(manifest.files)}, {megabytes(size)}, every sha256 matches"),
        ("tensors", f"{len(manifest.tensors)} with {values:,} values"),
        *((f"progress.{key}", str(value)) for key, value in manifest.progress.items()),
        *((key, str(value)) for key, value in manifest.identity.items() if isinstance(value, (str, int, float, list))),
        *((f"version of {key}", value) for key, value in manifest.versions.items()),
    ]
    print_table(str(saved.folder), rows)
    return 0


def _compare(first: SavedCheckpoint, second: SavedCheckpoint) -> int:
    ours, theirs = first.manifest, second.manifest
    settings = [
        (key, f"{ours.identity.get(key)} | {theirs.identity.get(key)}")
        for key in sorted(ours.identity.keys() | theirs.identity.keys())
        if ours.identity.get(key) != theirs.identity.get(key)
    ]
    progress = [
        (f"progress.{key}", f"{ours.progress.get(key)} | {theirs.progress.get(key)}")
        for key in sorted(ours.progress.keys() | theirs.progress.keys())
        if ours.progress.get(key) != theirs.progress.get(key)
    ]
    tensors = [(d.name, d.text) for d in contrast(first, second)]
    for name, text in settings + progress + tensors[:_SHOWN]:
        print(visible(f"{name}: {text}"))
    if len(tensors) > _SHOWN:
        print(f"... and {len(tensors) - _SHOWN} more tensors")
    common = ours.tensors.keys() & theirs.tensors.keys()
    same = len(common) - sum(name in common for name, _ in tensors)
    print(f"{same} tensors are bit-equal, {len(tensors)} are not; {len(settings)} settings differ.")
    return 1 if tensors or settings or progress else 0
