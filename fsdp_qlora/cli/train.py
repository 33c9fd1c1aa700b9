"""`train`: start the ranks, or be one of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from fsdp_qlora.api import World, prepare
from fsdp_qlora.cli.ranks import on_ranks
from fsdp_qlora.cli.show import loading, print_start, print_stopped, print_summary
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.dist.reduce import gather_json
from fsdp_qlora.dist.watch import leave_when
from fsdp_qlora.errors import STOPPED_EXIT_CODE, ConfigError, FsdpQloraError, RunFolderError
from fsdp_qlora.fit import fit
from fsdp_qlora.track.run_folder import RunFolder

_GO, _SHOW = "go", "show"


def run(config: RunConfig) -> int:
    """Train; return the exit code."""
    return on_ranks(config, lambda world: _rank(config, world))


def _rank(config: RunConfig, world: World) -> int:
    """Be one rank: claim the run folder together, prepare, fit, show."""
    folder = RunFolder(config.run.output_root, config.run.name)
    decision = _claim(folder, config, world)
    if decision["action"] == _SHOW:
        _show(folder, world.ranks.is_main, decision)
        return 0
    try:
        return _train(config, folder, world, decision)
    except FsdpQloraError as error:
        folder.write_exit(error.exit_code, world.ranks.rank, str(error))
        raise
    except Exception as error:
        folder.write_exit(1, world.ranks.rank, f"{type(error).__name__}: {error}")
        raise


def _train(config: RunConfig, folder: RunFolder, world: World, decision: dict[str, Any]) -> int:
    watch = leave_when(lambda: _failed_elsewhere(folder))
    config = replace(config, checkpoint=replace(config.checkpoint, resume=decision["resume"]))
    main = world.ranks.is_main
    prepared = prepare(config, world, loading() if main else None)
    if main:
        print_start(prepared, decision.get("note", ""))
    result = fit(prepared, folder)
    watch.set()
    code = 0 if result.finished else STOPPED_EXIT_CODE
    if main:
        folder.write_exit(code, 0)
        if result.finished:
            print_summary(result.summary, folder)
        else:
            print_stopped(folder)
    return code


def _failed_elsewhere(folder: RunFolder) -> bool:
    ended = folder.read_exit()
    return ended is not None and ended["code"] not in (0, STOPPED_EXIT_CODE)


def _claim(folder: RunFolder, config: RunConfig, world: World) -> dict[str, Any]:
    """Take the run folder on rank 0 and agree on what to do; every rank gets the same answer or error."""
    settings = to_dict(config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    decision: dict[str, Any] = {"digest": digest}
    if world.ranks.is_main:
        try:
            decision |= _decide(folder, config)
        except FsdpQloraError as error:
            decision |= {"code": error.exit_code, "message": str(error)}
    answers = gather_json(decision, world.ranks)
    for rank, other in enumerate(answers):
        if other["digest"] != answers[0]["digest"]:
            raise ConfigError(f"rank {rank} was started with other settings than rank 0; start all ranks alike.")
    if "code" in answers[0]:
        error = FsdpQloraError(answers[0]["message"])
        error.exit_code = answers[0]["code"]
        raise error
    return answers[0]


def _decide(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Decide what to do with what is in the folder (ADR 0003: the second run)."""
    folder.create()
    folder.lock()
    resume, note = config.checkpoint.resume, ""
    if folder.finished and resume == "auto" and _covers(folder, config):
        return {"action": _SHOW, "note": f"{folder.path} holds this finished run; nothing to do."}
    if resume == "never":
        if folder.finished:
            note = f"the finished run that was here is now {folder.move_away()}"
        elif folder.started and folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step_*")):
            raise RunFolderError(
                f"run.name: {folder.path} holds an unfinished run with checkpoints. Go on with it "
                "(checkpoint.resume=auto), or start anew under another run.name."
            )
    folder.clear_exit()
    folder.summary_file.unlink(missing_ok=True)
    folder.write_config(to_dict(config))
    return {"action": _GO, "resume": resume, "note": note}


def _covers(folder: RunFolder, config: RunConfig) -> bool:
    """Whether the finished run has all the steps now asked for."""
    asked = config.train.max_steps
    return asked == 0 or folder.read_summary().get("steps", 0) >= asked


def _show(folder: RunFolder, main: bool, decision: dict[str, Any]) -> None:
    if main:
        print(decision["note"])
        print_summary(folder.read_summary(), folder)
