"""Claims the run folder and decides what to do with an earlier run in it (ADR 0003: the second run).

The earlier run's settings and summary stay untouched until the run may certainly start: `RunFolder.begin` replaces
them, once `fit` has found and checked the checkpoint that it resumes from.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from fsdp_qlora.checkpoint.manifest import compare
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.checkpoint.resume import blocking_settings, without
from fsdp_qlora.config.auto import Resume
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.saved import read_config
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json, on_main
from fsdp_qlora.errors import ConfigError, FsdpQloraError, RunFolderError, typed_line
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import published


@dataclass(frozen=True)
class Decision:
    """What all ranks have agreed to do."""

    start: bool
    """False if the folder already holds this run, finished."""
    note: str = ""
    """Message for the user."""


def claim(folder: RunFolder, config: RunConfig, ranks: Ranks) -> Decision:
    """Claim the folder on rank 0 and agree on what to do. Every rank calls it.

    Raises:
        ConfigError: if the ranks were started with different settings.
        FsdpQloraError: identically on every rank, if the folder is in use or holds a run with other settings.
    """
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
    digests = gather_json(digest, ranks)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise ConfigError(
                f"rank {rank} was started with different settings from rank 0; start all ranks with the same ones."
            )
    return Decision(**on_main(lambda: asdict(_take(folder, config)), ranks))


def _take(folder: RunFolder, config: RunConfig) -> Decision:
    folder.create()
    folder.lock()
    try:
        decision = _decide(folder, config)
    except FsdpQloraError as error:
        folder.clear_exit()
        folder.write_exit(error.exit_code, 0, str(error))
        raise
    if decision.start:
        folder.clear_exit()
    return decision


def _decide(folder: RunFolder, config: RunConfig) -> Decision:
    resume = Resume.of(config.checkpoint.resume)
    if resume.never:
        if folder.finished:
            return Decision(True, f"the finished run that was here was moved to {folder.move_away()}")
        if complete_checkpoints(folder.checkpoints):
            raise RunFolderError(
                f"run.name: {folder.path} holds an unfinished run with checkpoints. Resume it "
                "(checkpoint.resume=auto), or start afresh under another run.name."
            )
        return Decision(True)
    if resume.newest and folder.started:
        saved = read_config(str(folder.config_file))
        try:
            before = blocking_settings(saved)
            finished = folder.finished and _covers(folder, saved["train"], config)
        except (KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"run.name: {folder.config_file} does not hold a run's settings ({typed_line(error)}). Choose another "
                "run.name, or remove the folder."
            ) from error
        if complete_checkpoints(folder.checkpoints):
            free, now = config.checkpoint.resume_overrides, blocking_settings(published(to_dict(config)))
            compare(without(before, free), without(now, free), folder.path)
        if finished:
            return Decision(False, f"{folder.path} holds this run, already finished; nothing to do.")
    return Decision(True)


def _covers(folder: RunFolder, saved: dict[str, Any], config: RunConfig) -> bool:
    """Whether the finished run already has all requested steps."""
    asked = config.train
    if asked.max_steps == saved["max_steps"] and asked.num_epochs == saved["num_epochs"]:
        return True
    return 0 < asked.max_steps <= folder.read_summary().get("steps", 0)
