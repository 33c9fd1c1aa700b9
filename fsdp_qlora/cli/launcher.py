"""Starts the ranks on this machine: a parent that handles signals, and torch's elastic agent in its own session.

The parent imports no torch. It hands the composed settings to the ranks, forwards the first signal, and kills them on
the second. At the end it prints the message of the first failure as the last line and exits with the true code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType

from fsdp_qlora.cli.life_signs import LifeSigns
from fsdp_qlora.cli.verdict import record, say, stopped_by, verdict
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.meeting import LOOPBACK, MEETING_VARIABLE
from fsdp_qlora.distributed.patience import Patience
from fsdp_qlora.distributed.signals import give_back_signals, take_signals
from fsdp_qlora.errors import StorageError
from fsdp_qlora.files.scratch import scratch_folder
from fsdp_qlora.run.exit import CONFIG_VARIABLE, EXIT_VARIABLE, Ending, tellings
from fsdp_qlora.run.folder import RunFolder

PACKAGE = Path(__file__).resolve().parent.parent
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_LEAVE_SECONDS = 8.0
"""Time that the ranks get to exit once one of them has reported a failure."""
_ANSWER_SECONDS = 5.0
"""How long to wait for the run folder, whose storage may be what hangs."""


def ranks_to_start(config: RunConfig) -> int:
    """Return the number of ranks to start: as configured, or one per accelerator of this machine."""
    if config.generate.device_map is not None:  # one process drives all devices
        return 1
    if config.launcher.nproc_per_node:
        return config.launcher.nproc_per_node
    has_device_files = any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "dri/render*"))
    if config.launcher.device == "cpu" or not has_device_files:
        return 1
    return max(1, _accelerators())


@cache
def _accelerators() -> int:
    """Return the number of accelerators; asked once, as a simulated one (`fsdp_qlora.simulate.device`) would count."""
    import torch

    return torch.accelerator.device_count()


def launch(verb: str, config: RunConfig, num_ranks: int) -> int:
    """Run ``verb`` on ``num_ranks`` ranks of this machine; return the exit code."""
    with _scratch_folder() as scratch:
        exit_file, config_file, meeting = scratch / "exit.json", scratch / "config.json", scratch / "meeting"
        meeting.mkdir(mode=0o700)
        config_file.write_text(json.dumps(to_dict(config)), encoding="utf-8")
        environment = {
            # Allocations of varying size come and go; transparent huge pages save a CPU run a fifth of its step time.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(config.launcher.shutdown_seconds),
            **LOOPBACK,
            **os.environ,
            MEETING_VARIABLE: str(meeting),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else the agent opens a port for the ranks' group
            CONFIG_VARIABLE: str(config_file),  # a file, as the kernel limits a variable to 128 KiB
            EXIT_VARIABLE: str(exit_file),
        }
        if Path.cwd() != PACKAGE.parent:  # keep the current folder off sys.path, unless the package is only there
            environment["PYTHONSAFEPATH"] = "1"
        restarts = config.launcher.max_restarts
        numbers = [str(os.getpid()), str(restarts)]
        command = [sys.executable, "-m", "fsdp_qlora.cli.agent", str(num_ranks), verb, *numbers]
        started = time.time()
        agent = subprocess.Popen(command, env=environment, start_new_session=True)
        signs = LifeSigns(meeting, config.launcher.timeout_seconds)
        saves = verb == "train"
        num_signals, standstill = _wait(
            agent, exit_file, restarts, signs, "saving, then exiting" if saves else "exiting"
        )
        for left in signs.left_behind():
            print(
                f"fsdp-qlora: {left} does not exit: a driver or storage is blocking it. Not waiting for it.",
                file=sys.stderr,
            )
        stopped = stopped_by(num_signals, signs.begun, saves)
        ending = verdict(exit_file, restarts, agent.returncode, stopped, standstill)
        if saves:
            folder = RunFolder(config.run.output_root, config.run.name)
            with suppress(TimeoutError):
                Patience(_ANSWER_SECONDS, "the storage").ask(lambda: record(ending, folder, started))
        say(ending)
        return ending.code


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Create a folder in which the ranks and their launcher exchange files.

    Raises:
        StorageError: if no temporary folder can be written.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder("fsdp_qlora-"))
        except OSError as error:
            raise StorageError(
                f"TMPDIR: no folder for temporary files is writable ({error.strerror}); set TMPDIR to a writable one."
            ) from error
        yield folder


def _wait(
    agent: subprocess.Popen[bytes], exit_file: Path, last_start: int, signs: LifeSigns, answer: str
) -> tuple[int, Ending | None]:
    """Wait for the agent: forward the first signal; kill it on the second, after a standstill or a stuck failure.

    The first signal is answered with ``answer`` on the screen.

    Returns the number of signals received, and the ending found if all ranks stood still.
    """
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            print(
                f"\n{signal.Signals(number).name}: {answer}; send it again to exit immediately.",
                file=sys.stderr,
            )
            agent.send_signal(number)
        else:
            agent.kill()  # its ranks die with it

    standstill = failed_at = None
    before = take_signals(_SIGNALS, forward)
    try:
        while agent.poll() is None:
            time.sleep(0.05)
            if failed_at is None and any(ending.failed for ending in tellings(exit_file, last_start)):
                failed_at = time.monotonic()
            late = failed_at is not None and time.monotonic() - failed_at > _LEAVE_SECONDS
            standstill = standstill or signs.standstill()
            if late or standstill is not None:
                agent.kill()  # a rank that stands still does not handle SIGTERM, but dies with the agent
    finally:
        give_back_signals(before)
    return len(received), standstill
