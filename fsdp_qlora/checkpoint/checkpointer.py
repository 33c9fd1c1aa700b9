"""`Checkpointer`: saves in the background, finds the newest valid checkpoint, loads it onto any number of ranks.

A save runs in a thread. It copies this rank's shards while the next forward and backward run, which do not change them;
only the next update has to wait for the copy. Then the ranks use their own process group to write the copies as
safetensors with torch's DCP and to agree that all succeeded, and rank 0 publishes the checkpoint. Only tensors go to
DCP, which would put anything else into a pickle inside a .safetensors file.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load

from fsdp_qlora.checkpoint.manifest import FORMAT, Manifest, SavedCheckpoint, compare
from fsdp_qlora.checkpoint.publish import complete_checkpoints, remove, set_aside, step_folder, tidy
from fsdp_qlora.checkpoint.resume import without
from fsdp_qlora.checkpoint.retention import Retention, superfluous
from fsdp_qlora.checkpoint.verify import verify
from fsdp_qlora.checkpoint.write import Stage, WriteAdapter, write_checkpoint
from fsdp_qlora.config.auto import Resume
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.process import use_device
from fsdp_qlora.distributed.reduce import barrier, on_main
from fsdp_qlora.errors import CheckpointError, FsdpQloraError, SecurityError, StorageError
from fsdp_qlora.files.read import walk, warn_of_others

_log = logging.getLogger(__name__)

MAX_FAILURES = 2
"""Number of consecutive failed saves after which a run stops."""
Tensors = Callable[[], Mapping[str, torch.Tensor]]
"""Returns this rank's shards; `Checkpointer.save` calls it in the thread, `Checkpointer.finish` directly."""


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint other than its tensors."""

    step: int
    progress: dict[str, Any]
    identity: dict[str, Any]
    versions: dict[str, str]


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        retention: Retention | None = None,
        fallback: Path | None = None,
        asynchronous: bool = True,
        write_adapter: WriteAdapter | None = None,
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        """Manage the checkpoints in ``folder``.

        Args:
            folder: holds the ``step_<step>`` folders; every rank must have access to it.
            ranks: the ranks of the run.
            retention: which checkpoints to keep; None keeps the newest two.
            fallback: folder for a last save if ``folder`` becomes unwritable.
            asynchronous: return while a save is still being written; False waits for each save.
            write_adapter: called on rank 0, in the thread, with a folder, the whole trained tensors and the progress;
                it must not communicate.
            say: receives warnings, on rank 0.
        """
        self.folder, self.ranks, self.fallback = folder, ranks, fallback
        self.retention = retention or Retention()
        self._asynchronous, self._write_adapter, self._say = asynchronous, write_adapter, say
        self._background = ranks.in_background
        pinned = ranks.device.type != "cpu"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
            )
        )
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=use_device, initargs=(ranks.device,))
        self._pending: tuple[int, Future[str | None]] | None = None
        self._failures, self._saved_step = 0, -1
        self._problem: str | None = None
        self._staging: Future[None] | None = None
        self._stall = 0.0
        self._told_kept = False

    @property
    def gave_up(self) -> bool:
        """Whether `MAX_FAILURES` consecutive saves have failed, including the one in flight, so the run should stop."""
        failed_now = self._pending is not None and self._pending[1].done() and self._pending[1].result() is not None
        return self._failures + failed_now >= MAX_FAILURES

    def save(self, snapshot: Snapshot, tensors: Tensors) -> None:
        """Start a save on all ranks. The tensors must not change until `before_update` has returned.

        A failed save is reported to the user, and the next save is the second attempt (see `gave_up`, `finish`).
        """
        started = time.perf_counter()
        self.settle()  # at most one in flight
        staged: Future[None] = Future()
        pending = self._submit(snapshot, lambda: self._stage(tensors, staged))
        pending.add_done_callback(lambda _: staged.done() or staged.set_result(None))  # even if the save failed
        self._staging = staged
        if not self._asynchronous:
            self.settle()
        self._stall += time.perf_counter() - started

    def before_update(self) -> None:
        """Wait until the tensors of a save in flight have been copied; call it before they change."""
        if self._staging is not None:
            started = time.perf_counter()
            self._staging.result()
            self._staging = None
            self._stall += time.perf_counter() - started

    def take_stall(self) -> float | None:
        """Return the seconds for which saving has blocked training since the last call, or None if it has not."""
        stall, self._stall = self._stall, 0.0
        return stall or None

    def finish(self, snapshot: Snapshot, tensors: Tensors) -> None:
        """Make sure the checkpoint of ``snapshot`` is on disk: wait for it, or write it now.

        Raises:
            StorageError: on every rank, if two consecutive saves have failed; a last save goes to the fallback folder.
        """
        self.settle()
        if self._saved_step == snapshot.step:
            return
        staged = self._stage(tensors)
        while self._failures < MAX_FAILURES:
            self._submit(snapshot, lambda: staged)
            self.settle()
            if self._saved_step == snapshot.step:
                return
        self._emergency(snapshot, staged)

    def settle(self) -> None:
        """Wait for the save in flight, if there is one."""
        if self._pending is not None:
            (step, pending), self._pending = self._pending, None
            self._problem = pending.result()
            if self._problem is None:
                self._failures, self._saved_step = 0, step
            else:
                self._failures += 1

    def _stage(self, tensors: Tensors, done: Future[None] | None = None) -> dict[str, torch.Tensor]:
        """Copy this rank's shards to reusable CPU buffers; set ``done`` even if that fails."""
        try:
            named = dict(tensors())
            for name, value in named.items():
                if not isinstance(value, torch.Tensor):
                    kind = type(value).__name__
                    raise SecurityError(f"{name} is a {kind}: only tensors are saved; everything else is JSON.")
            staged = self._stager.stage(named)
            assert isinstance(staged, dict)
            return staged
        finally:
            if done is not None:
                done.set_result(None)

    def _submit(self, snapshot: Snapshot, stage: Stage) -> Future[str | None]:
        pending = self._thread.submit(self._write, self.folder, snapshot, stage)
        self._pending = snapshot.step, pending
        return pending

    def close(self) -> None:
        """Wait for the save in flight and end the thread."""
        self.settle()
        self._thread.shutdown()
        self._stager.close()

    def _write(self, folder: Path, snapshot: Snapshot, stage: Stage) -> str | None:
        """Stage, write and publish, in the thread; return the error, identical on every rank, or None."""
        manifest = Manifest(
            FORMAT, snapshot.step, self.ranks.size, snapshot.progress, snapshot.identity, {}, {}, snapshot.versions
        )
        target = step_folder(folder, snapshot.step)
        self._background.phases.enter(f"writing the checkpoint of step {snapshot.step}")
        try:
            write_checkpoint(target, manifest, stage, self._background, self._write_adapter)
            if self.ranks.is_main and folder == self.folder:
                self._remove_old()
        except (FsdpQloraError, OSError, RuntimeError) as error:
            problem = str(error) if str(error).endswith((".", "?", "!")) else f"{error}."
            if self.ranks.is_main:
                self._say(f"checkpoint of step {snapshot.step} FAILED; older checkpoints are intact: {problem}")
            return problem
        finally:
            self._background.phases.rest()
        return None

    def _remove_old(self) -> None:
        """Delete old checkpoints on rank 0. Raises nothing: the new one is written, and other ranks count it so."""
        try:
            for old in superfluous(complete_checkpoints(self.folder), self.retention):
                self._tell_kept(remove(old))
        except (FsdpQloraError, OSError) as error:
            self._tell_kept(str(error).rstrip("."))

    def _tell_kept(self, problem: str | None) -> None:
        """Warn once per run that old checkpoints cannot be deleted: they fill the disk, but need not stop the run."""
        if problem is not None and not self._told_kept:
            self._told_kept = True
            self._say(
                f"checkpoint.keep_last: an old checkpoint cannot be deleted and still takes up space ({problem})."
            )

    def _emergency(self, snapshot: Snapshot, staged: dict[str, torch.Tensor]) -> NoReturn:
        message = f"checkpoint: {MAX_FAILURES} saves in a row failed, the last because {self._problem} The run stops. "
        if self.fallback is None:
            raise StorageError(message + "Older checkpoints are intact.")
        problem = self._thread.submit(self._write, self.fallback, snapshot, lambda: staged).result()
        if problem is not None:
            raise StorageError(message + f"checkpoint.fallback_dir failed as well: {problem}")
        saved = step_folder(self.fallback, snapshot.step)
        raise StorageError(message + f"It was saved to {saved}; resume with checkpoint.resume={saved}.")

    def find(self, resume: Resume, identity: dict[str, Any], overrides: Sequence[str] = ()) -> SavedCheckpoint | None:
        """Return the checkpoint to resume from, chosen by rank 0 for all ranks, or None to start afresh.

        It is the newest valid one; damaged ones are skipped with a warning. Settings named in ``overrides`` may differ.

        Raises:
            CheckpointError: if the requested checkpoint is missing or damaged, or if there are some but none is valid.
            SecurityError: if a checkpoint contains something that our saves never write.
            ConfigError: if the checkpoint was made with other settings.
        """

        def search() -> list[Any] | None:
            for problem in tidy(self.folder):
                self._tell_kept(problem)
            chosen = self._search(resume)
            if chosen is None:
                return None
            compare(without(chosen.manifest.identity, overrides), without(identity, overrides), chosen.folder)
            return [str(chosen.folder), asdict(chosen.manifest)]

        chosen = on_main(search, self.ranks)
        return None if chosen is None else SavedCheckpoint(Path(chosen[0]), Manifest(**chosen[1]))

    def _search(self, resume: Resume) -> SavedCheckpoint | None:
        if resume.never:
            return None
        if resume.folder is not None:
            return open_checkpoint(resume.folder)
        problems = []
        for folder in reversed(complete_checkpoints(self.folder)):
            try:
                opened = open_checkpoint(folder)
            except CheckpointError as error:
                problems.append(str(error))
                self._say(f"skipping a damaged checkpoint: {error}")
                continue
            return opened
        if problems:
            raise CheckpointError("no checkpoint of this run is valid:\n" + "\n".join(problems))
        return None

    def load(self, saved: SavedCheckpoint, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a checkpoint into ``tensors``, however they are sharded now and on any number of ranks.

        Newer checkpoints of this run, which it does not resume from, are set aside.

        Raises:
            CheckpointError: if the checkpoint cannot be read, or its tensors differ from these in name or shape.
        """
        folder, manifest = saved.folder, saved.manifest
        wanted = {name: list(t.shape) for name, t in tensors.items()}
        if wanted != manifest.tensors:
            odd = sorted(k for k in wanted.keys() | manifest.tensors.keys() if wanted.get(k) != manifest.tensors.get(k))
            raise CheckpointError(
                f"{folder}: {odd[0]} is {manifest.tensors.get(odd[0])} in the checkpoint and {wanted.get(odd[0])} in "
                f"this run ({len(odd)} tensors differ)."
            )
        reader = HuggingFaceStorageReader(str(folder))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(dict(tensors), storage_reader=reader, process_group=self.ranks.group)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        if self.ranks.is_main:
            for moved in set_aside(self.folder, manifest.step):
                self._say(f"resuming from step {manifest.step}; a later checkpoint was moved to {moved}.")
        barrier(self.ranks)


def open_checkpoint(folder: Path) -> SavedCheckpoint:
    """Read and verify a checkpoint without loading it; warn if other users can change it.

    Raises:
        CheckpointError: if it is incomplete or damaged.
        SecurityError: if it contains something that our saves never write.
    """
    manifest = Manifest.read(folder)
    verify(folder, manifest)
    warn_of_others(folder, *(Path(entry.path) for entry in walk(folder)))
    return SavedCheckpoint(folder, manifest)
