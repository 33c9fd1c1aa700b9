"""`Checkpointer`: save and load sharded tensors with torch's DCP in safetensors, plus JSON.

A checkpoint is written to a fresh temporary folder, synced, renamed, and counts only with its COMPLETE file, which
holds the sha256 of manifest.json. Only tensors enter DCP, which would hide anything else in a pickle inside a
.safetensors file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fsdp_qlora.checkpoint.manifest import COMPLETE, FORMAT, MANIFEST, Manifest, compare, list_files, sha256
from fsdp_qlora.dist.mesh import Ranks
from fsdp_qlora.dist.reduce import barrier, gather_json
from fsdp_qlora.errors import CheckpointError, FsdpQloraError, SecurityError, StorageError, raise_alike

_STEP_FOLDER = re.compile(r"step_(\d{8})")
Attach = Callable[[Path], None]
"""Writes more into a checkpoint's subfolders (all ranks call it; a ready adapter)."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder`` that have their COMPLETE file, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if _STEP_FOLDER.fullmatch(f.name) and (f / COMPLETE).is_file())


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, ranks: Ranks, keep_last: int = 2) -> None:
        self.folder, self.ranks, self.keep_last = folder, ranks, keep_last

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        progress: dict[str, Any],
        identity: dict[str, Any],
        versions: dict[str, str],
        attach: Attach | None = None,
    ) -> Path:
        """Write ``step_<step>`` with all ranks; return its folder.

        Raises:
            StorageError: on every rank, if any rank cannot write; older checkpoints are as they were.
        """
        _require_tensors(tensors)
        target = self.folder / f"step_{step:08d}"
        staging = self.folder / f".saving_{target.name}"
        self._all_or_none(lambda: _make_fresh(staging) if self.ranks.is_main else None)
        self._all_or_none(lambda: self._write_tensors(staging, tensors))
        if attach is not None:
            self._all_or_none(lambda: attach(staging))
        manifest = Manifest(
            FORMAT, step, self.ranks.size, progress, identity,
            {name: list(t.shape) for name, t in tensors.items()}, {}, versions,
        )  # fmt: skip
        self._all_or_none(lambda: _publish(staging, target, manifest) if self.ranks.is_main else None)
        if self.ranks.is_main:
            self._prune()
        return target

    def _write_tensors(self, staging: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(dict(tensors), storage_writer=writer, process_group=self.ranks.group)

    def _all_or_none(self, work: Callable[[], None]) -> None:
        """Do something on this rank; raise on all ranks if it failed on any."""
        problem = None
        try:
            work()
        except FsdpQloraError as error:
            problem = str(error)
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = f"{type(error).__name__}: {error}"
        problems = gather_json(problem, self.ranks)
        for rank, message in enumerate(problems):
            if message is not None:
                raise StorageError(f"checkpoint: rank {rank} could not write to {self.folder}: {message}")

    def _prune(self) -> None:
        """Remove all but the newest ``keep_last`` complete checkpoints; leave what is not a complete one alone."""
        for old in self.complete()[: -self.keep_last]:
            trash = old.with_name(f".removing_{old.name}")
            shutil.rmtree(trash, ignore_errors=True)
            old.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def complete(self) -> list[Path]:
        """Return the folders that have their COMPLETE file, oldest first."""
        return complete_checkpoints(self.folder)

    def find(self, resume: str, identity: dict[str, Any]) -> tuple[Path, Manifest] | None:
        """Return the checkpoint to resume from, decided by rank 0 for all, or None to start anew.

        ``resume`` is ``auto`` (the newest valid one; a damaged one is passed over and said), ``never`` or a path.

        Raises:
            CheckpointError: if a demanded checkpoint is missing or damaged, or none of several is valid.
            ConfigError: if the checkpoint was made with other settings.
        """
        verdict: dict[str, Any] = {}
        if self.ranks.is_main:
            try:
                found = self._search(resume)
                if found:
                    compare(found[1].identity, identity, found[0])
                    verdict = {"folder": str(found[0]), "manifest": asdict(found[1])}
            except FsdpQloraError as error:
                verdict = {"code": error.exit_code, "message": str(error)}
        verdict = gather_json(verdict, self.ranks)[0]
        raise_alike(verdict)
        return (Path(verdict["folder"]), Manifest(**verdict["manifest"])) if verdict else None

    def _search(self, resume: str) -> tuple[Path, Manifest] | None:
        if resume == "never":
            return None
        if resume != "auto":
            return _open(Path(resume).expanduser())
        candidates = self.complete()
        problems = []
        for folder in reversed(candidates):
            try:
                return _open(folder)
            except CheckpointError as error:
                problems.append(str(error))
                warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
        if problems:
            raise CheckpointError("no checkpoint of this run is valid:\n" + "\n".join(problems))
        return None

    def load(self, folder: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill ``tensors`` (sharded as they are now, on any number of ranks) from a checkpoint.

        Raises:
            CheckpointError: if its tensors are not just these, by name and shape.
        """
        wanted = {name: list(t.shape) for name, t in tensors.items()}
        if wanted != manifest.tensors:
            odd = sorted(k for k in wanted.keys() | manifest.tensors.keys() if wanted.get(k) != manifest.tensors.get(k))
            raise CheckpointError(
                f"{folder}: {odd[0]} is {manifest.tensors.get(odd[0])} in the checkpoint and {wanted.get(odd[0])} in "
                f"this run ({len(odd)} tensors differ)."
            )
        reader = HuggingFaceStorageReader(str(folder))
        try:
            load(dict(tensors), storage_reader=reader, process_group=self.ranks.group)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        barrier(self.ranks)


def _open(folder: Path) -> tuple[Path, Manifest]:
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    return folder, manifest


def _require_tensors(tensors: Mapping[str, Any]) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise SecurityError(f"{name} is a {type(value).__name__}: only tensors are saved, all else is JSON.")


def _make_fresh(staging: Path) -> None:
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def _publish(staging: Path, target: Path, manifest: Manifest) -> None:
    """Hash and sync what was written, rename the folder, and write COMPLETE last."""
    for name in list_files(staging):
        file = staging / name
        _sync(file)
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as written:  # what cannot be opened again is no checkpoint
                written.keys()
        manifest.files[name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest.write(staging)
    _sync(staging / MANIFEST)
    _sync(staging)
    if target.exists():  # of an earlier attempt: complete ones are never written again
        replaced = target.with_name(f".replaced_{target.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    staging.rename(target)
    digest = hashlib.sha256((target / MANIFEST).read_bytes()).hexdigest()
    (target / COMPLETE).write_text(digest + "\n")
    _sync(target / COMPLETE)
    _sync(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
