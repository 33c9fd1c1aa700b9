"""`train`: start the ranks, or be one of them."""

from __future__ import annotations

import sys
from functools import partial

from fsdp_qlora.api import World, prepare
from fsdp_qlora.claim import claim
from fsdp_qlora.cli.ranks import on_ranks
from fsdp_qlora.cli.show import loading, print_samples, print_start, print_stopped, print_summary
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.dist.signals import StopSignals
from fsdp_qlora.dist.watch import Watch
from fsdp_qlora.errors import STOPPED_EXIT_CODE, FsdpQloraError
from fsdp_qlora.track.process_exit import has_launcher, restart_count, tell_launcher
from fsdp_qlora.track.run_folder import RunFolder
from fsdp_qlora.training import fit


def run(config: RunConfig) -> int:
    """Train; return the exit code."""
    return on_ranks(config, lambda world: _listen(config, world))


def _listen(config: RunConfig, world: World) -> int:
    """Take a signal for a wish to stop as soon as all ranks are here, also while loading.

    Not before: who waits for a rank that never comes runs no handler, and a signal must end it.
    """
    with StopSignals() as signals:
        return _rank(config, world, signals)


def _rank(config: RunConfig, world: World, signals: StopSignals) -> int:
    """Be one rank: claim the run folder together, prepare, fit, show."""
    folder = RunFolder(config.run.output_root, config.run.name)
    decision = claim(folder, config, world.ranks)
    if not decision.start:
        _show(folder, world.ranks.is_main, decision.note)
        return 0
    try:
        return _train(config, folder, world, decision.note, signals)
    except FsdpQloraError as error:
        folder.write_exit(error.exit_code, world.ranks.rank, str(error))
        raise
    except Exception as error:
        if _failed_elsewhere(folder):  # an echo: the others have left, and one of them has said why
            raise SystemExit(1) from error
        folder.write_exit(1, world.ranks.rank, f"{type(error).__name__}: {error}")
        raise


def _train(config: RunConfig, folder: RunFolder, world: World, note: str, signals: StopSignals) -> int:
    watch = Watch(world.ranks, world.phases, config.launcher.timeout_seconds)
    watch.start(lambda: _failed_elsewhere(folder), partial(_hung, folder, world.ranks.rank))
    main = world.ranks.is_main
    if main and (restarts := restart_count()):
        print(f"restart {restarts}: going on from the last checkpoint", flush=True)
    prepared = prepare(config, world, loading() if main else None)
    if main:
        print_start(prepared, note)
        print_samples(prepared, folder)
    result = fit(prepared, folder, signals)
    watch.stop()
    code = 0 if result.finished else STOPPED_EXIT_CODE
    if main:
        folder.write_exit(code, 0)
        if result.finished:
            print_summary(result.summary, folder)
        else:
            print_stopped(folder)
    return code


def _hung(folder: RunFolder, rank: int, message: str) -> None:
    """Say which rank holds up the others, in the watch's thread."""
    folder.write_exit(1, rank, message)
    if tell_launcher(1, message) and not has_launcher():
        print(f"fsdp-qlora, rank {rank}: {message}", file=sys.stderr, flush=True)


def _failed_elsewhere(folder: RunFolder) -> bool:
    ended = folder.read_exit()
    return ended is not None and ended["code"] not in (0, STOPPED_EXIT_CODE)


def _show(folder: RunFolder, main: bool, note: str) -> None:
    if main:
        print(note)
        print_summary(folder.read_summary(), folder)
