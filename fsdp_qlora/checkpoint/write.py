"""Writes one checkpoint with all ranks, in the checkpoint thread, over a process group that nothing else uses."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fsdp_qlora.checkpoint.manifest import Manifest, list_files
from fsdp_qlora.checkpoint.publish import make_fresh, publish, staging_for
from fsdp_qlora.checkpoint.verify import ADAPTER_FOLDER
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.phases import Phases
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.errors import FsdpQloraError, StorageError, with_remedy
from fsdp_qlora.files.read import file_sha256
from fsdp_qlora.files.write import sync

MODEL_PREFIX = "model."
Stage = Callable[[], dict[str, torch.Tensor]]
"""Returns the copies of the tensors to write."""
WriteAdapter = Callable[[Path, Mapping[str, torch.Tensor], dict[str, Any]], object]
"""Writes an adapter, given a folder, whole tensors by their names in PEFT's file, and the checkpoint's progress."""


def write_checkpoint(
    target: Path,
    manifest: Manifest,
    stage: Stage,
    ranks: Ranks,
    write_adapter: WriteAdapter | None,
) -> None:
    """Write the checkpoint ``target`` atomically.

    Raises:
        StorageError: identically on every rank, naming the rank that could not write.
    """
    staging, tensors = staging_for(target), {}

    def begin() -> None:
        tensors.update(stage())
        manifest.tensors.update({name: list(t.shape) for name, t in tensors.items()})
        _begin(staging, tensors, ranks)

    try:
        together(ranks, target, begin)
        together(ranks, target, lambda: _write_shards(staging, tensors, ranks), alone=False)
        for files in together(ranks, target, lambda: _digests(staging, f"shard-{ranks.rank + 1:05d}-")):
            manifest.files.update(files)
        together(ranks, target, lambda: _finish(staging, target, manifest, write_adapter) if ranks.is_main else None)
    except StorageError:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def together(ranks: Ranks, target: Path, work: Callable[[], Any], alone: bool = True) -> list[Any]:
    """Run ``work`` on every rank; return all results (JSON values), or raise on all ranks if any of them failed.

    Args:
        ranks: the ranks, over the checkpoint's own process group.
        target: the checkpoint, for the message.
        work: what to run.
        alone: whether ``work`` runs without waiting for other ranks.

    Raises:
        StorageError: identically on every rank, naming the first rank that failed.
    """
    told: dict[str, Any]
    try:
        with ranks.phases.by_itself() if alone else nullcontext():
            told = {"result": work()}
    except FsdpQloraError as error:
        told = {"problem": str(error)}
    except CheckpointException as error:  # DCP has gathered the failures by rank, with tracebacks
        rank, (cause, _) = min(error.failures.items())
        told = {"problem": f"{type(cause).__name__}: {with_remedy(cause)}", "rank": rank}
    except (OSError, RuntimeError) as error:
        told = {"problem": f"{type(error).__name__}: {with_remedy(error)}"}
    except Exception as error:  # the other ranks wait for this one, so they must learn of any error
        told = {"problem": f"unexpected {type(error).__name__}: {error}"}
    answers = gather_json(told, ranks)
    for rank, answer in enumerate(answers):
        if "problem" in answer:
            raise StorageError(f"rank {answer.get('rank', rank)} could not write {target}: {answer['problem']}")
    return [answer["result"] for answer in answers]


def _begin(staging: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    if not ranks.is_main:
        return
    make_fresh(staging)
    needed = sum(math.prod(t.shape) * t.element_size() for t in tensors.values())
    needed += sum(math.prod(t.shape) * t.element_size() for n, t in tensors.items() if n.startswith(MODEL_PREFIX))
    free = shutil.disk_usage(staging).free
    if free < needed:
        raise StorageError(
            f"it needs {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free there; free up space."
        )


class _Writer(HuggingFaceStorageWriter):
    """Marks the phase in which this rank writes alone; before and after it, DCP waits for the other ranks."""

    def __init__(self, folder: Path, phases: Phases) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._phases = phases

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync this rank's files."""
        with self._phases.by_itself():
            return super().write_data(plan, planner)


def _write_shards(staging: Path, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
    writer = _Writer(staging, ranks.phases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(tensors, storage_writer=writer, process_group=ranks.group)  # syncs each file


def _digests(staging: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of the files whose name starts with ``prefix``."""
    return {
        name: {"size": (staging / name).stat().st_size, "sha256": file_sha256(staging / name, follow=False)}
        for name in list_files(staging)
        if name.startswith(prefix)
    }


def _finish(staging: Path, target: Path, manifest: Manifest, write_adapter: WriteAdapter | None) -> None:
    """On rank 0, build the adapter from the shards, which proves that they are readable, then publish."""
    if write_adapter is not None:
        names = [name for name in manifest.tensors if name.startswith(MODEL_PREFIX)]
        whole = read_tensors(staging, {name: manifest.tensors[name] for name in names})
        plain = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in whole.items()}
        write_adapter(staging / ADAPTER_FOLDER, plain, manifest.progress)
        for name in list_files(staging / ADAPTER_FOLDER):
            sync(staging / ADAPTER_FOLDER / name)
        manifest.files.update(_digests(staging, f"{ADAPTER_FOLDER}/"))
    publish(staging, target, manifest)


def read_tensors(folder: Path, shapes: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    """Read whole tensors from a checkpoint's shards in a single process, each in the dtype it was saved in."""
    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    whole = {name: torch.empty(shape, dtype=stored[name].properties.dtype) for name, shape in shapes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(whole, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return whole
