"""`train`: runs one rank of a training."""

from __future__ import annotations

import signal
import sys
from contextlib import nullcontext, suppress
from typing import Any

from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.cli.logs import keeping
from fsdp_qlora.cli.ranks import on_ranks
from fsdp_qlora.cli.report import report_beside
from fsdp_qlora.cli.show import print_samples, print_start, print_stopped, print_summary
from fsdp_qlora.config.auto import Resume
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.patience import Patience
from fsdp_qlora.distributed.signals import STOP_SIGNALS, StopSignals, take_signals
from fsdp_qlora.distributed.watch import Leave, Outside, Watch
from fsdp_qlora.errors import STOPPED_EXIT_CODE
from fsdp_qlora.run.claim import claim
from fsdp_qlora.run.exit import (
    NOTHING_TO_SAVE,
    Ending,
    ending_of,
    has_launcher,
    restart_count,
    tell_launcher,
)
from fsdp_qlora.run.fit import fit
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.prepare import prepare
from fsdp_qlora.run.troubleshooting import printed
from fsdp_qlora.run.world import World

_ANSWER_SECONDS = 2.0
"""How long to wait for the run folder's storage when writing the last message."""


def run(config: RunConfig) -> int:
    """Train; return the exit code."""
    return on_ranks(config, lambda world: _listen(config, world))


def _listen(config: RunConfig, world: World) -> int:
    """Treat signals as requests to stop once all ranks have arrived, even while loading.

    Not earlier: a process that waits for a missing rank runs no handlers, so a signal must end it directly.
    """
    take_signals(STOP_SIGNALS, signal.SIG_DFL)  # these apply again once the run is over
    with StopSignals() as signals:
        return _rank(config, world, signals)


def _rank(config: RunConfig, world: World, signals: StopSignals) -> int:
    """Run one rank: claim the run folder together with the others, prepare, fit, and show the result."""
    folder = RunFolder(config.run.output_root, config.run.name)
    run = _Run(folder, world.ranks.rank, signals)
    watch = Watch(world.ranks, config.launcher.timeout_seconds)
    watch.start(Outside(run.ended_elsewhere, run.stopped, run.leave, run.tell))
    world.ranks.phases.enter("claiming the run folder")
    decision = claim(folder, config, world.ranks)
    run.claimed = True
    if not decision.start:
        watch.stop()
        _show(config, folder, world.ranks.is_main, decision.note)
        return 0
    try:
        with keeping(folder.messages_file) if world.ranks.is_main else nullcontext():
            return _train(config, folder, world, decision.note, signals, watch)
    except Exception as error:
        ending = ending_of(error)
        if not ending.expected and (code := run.ended_elsewhere()) is not None:
            raise SystemExit(code) from error  # a consequence: another rank has ended and reported why
        folder.write_exit(ending.code, ending.rank, ending.message)
        if world.ranks.size == 1 and folder.metrics_file.is_file():  # with several, the launcher does it: others wait
            watch.stop()  # else it ends this process once it sees exit.json
            report_beside(folder.path)
        raise


class _Run:
    """Callbacks for the watch, which calls them in its own thread."""

    def __init__(self, folder: RunFolder, rank: int, signals: StopSignals) -> None:
        self._folder, self._rank, self._signals = folder, rank, signals
        self.claimed = False
        """Whether exit.json belongs to this start."""

    def ended_elsewhere(self) -> int | None:
        """Return the nonzero exit code with which another rank has ended the run, or None."""
        ended = self._folder.read_exit() if self.claimed else None
        return ended["code"] if ended is not None and ended["code"] != 0 else None

    def stopped(self) -> Leave | None:
        """Return how to leave if a signal has come and there is nothing to save, else None."""
        at_once = self._signals.requested and not self._signals.something_to_save
        return Leave(STOPPED_EXIT_CODE, NOTHING_TO_SAVE) if at_once else None

    def tell(self, states: list[dict[str, Any]]) -> None:
        """Record what the ranks are doing, for `fsdp-qlora watch`."""
        if self.claimed:
            self._folder.write_ranks(states)

    def leave(self, last: Leave) -> None:
        """Report why this rank leaves, to the launcher first, since the run folder's storage may be what hangs."""
        tell_launcher(Ending(last.code, self._rank, last.message))
        if self.claimed:
            with suppress(TimeoutError):
                storage = Patience(_ANSWER_SECONDS, "the storage")
                storage.ask(lambda: self._folder.write_exit(last.code, self._rank, last.message))
        if not has_launcher():
            print(f"fsdp-qlora, rank {self._rank}: {printed(last.message)}", file=sys.stderr, flush=True)


def _train(config: RunConfig, folder: RunFolder, world: World, note: str, signals: StopSignals, watch: Watch) -> int:
    main = world.ranks.is_main
    if main and (restarts := restart_count()):
        print(f"restart {restarts}: {_goes_on(config, folder)}", flush=True)
    prepared = prepare(config, world)
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
            print_stopped(result.checkpoint)
        report_beside(folder.path)
    return code


def _goes_on(config: RunConfig, folder: RunFolder) -> str:
    """Return where a restarted run goes on from."""
    resume = Resume.of(config.checkpoint.resume)
    if resume.folder is not None:
        return f"resuming from {resume.folder} (checkpoint.resume)"
    if resume.newest and complete_checkpoints(folder.checkpoints):
        return "resuming from the last checkpoint"
    return "there is no checkpoint to resume from, so starting over"


def _show(config: RunConfig, folder: RunFolder, main: bool, note: str) -> None:
    if main:
        print(note)
        print_summary(folder.read_summary(), folder)
