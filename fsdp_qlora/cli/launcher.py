"""Start the ranks on this machine: a parent that counts signals, and torch's elastic agent in a session of its own.

The parent imports no torch. It hands the composed settings to the ranks, passes a first signal on, ends all at a
second, and at the end prints the first failure's message last and exits with the true code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.dist.meeting import LOOPBACK, MEETING_VARIABLE
from fsdp_qlora.dist.signals import give_back_signals, take_signals
from fsdp_qlora.errors import STOPPED_EXIT_CODE, StorageError
from fsdp_qlora.shown import visible
from fsdp_qlora.track.process_exit import CONFIG_VARIABLE, EXIT_VARIABLE, read_exit
from fsdp_qlora.track.run_folder import RunFolder

PACKAGE = Path(__file__).resolve().parent.parent
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_LEAVE_SECONDS = 8.0
"""Time the ranks have to leave once one of them has told of a failure."""


def ranks_to_start(config: RunConfig) -> int:
    """Return the number of ranks: as set, or one per accelerator of this machine."""
    if config.launcher.nproc_per_node:
        return config.launcher.nproc_per_node
    has_device_files = any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "dri/render*"))
    if config.launcher.device == "cpu" or not has_device_files:
        return 1
    import torch

    return max(1, torch.accelerator.device_count())


def launch(verb: str, config: RunConfig, num_ranks: int) -> int:
    """Run ``verb`` on ``num_ranks`` ranks of this machine; return the exit code."""
    with _scratch_folder() as scratch:
        exit_file, config_file, meeting = scratch / "exit.json", scratch / "config.json", scratch / "meeting"
        meeting.mkdir(mode=0o700)
        config_file.write_text(json.dumps(to_dict(config)), encoding="utf-8")
        environment = {
            # Activations of uneven length come and go; transparent huge pages spare a CPU run a fifth of its step.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(config.launcher.shutdown_seconds),
            **LOOPBACK,
            **os.environ,
            MEETING_VARIABLE: str(meeting),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else the agent listens on a port for the ranks' group
            CONFIG_VARIABLE: str(config_file),  # a file: the kernel lets no variable be longer than 128 KiB
            EXIT_VARIABLE: str(exit_file),
        }
        if Path.cwd() != PACKAGE.parent:  # else the current folder may be the only place that has this package
            environment["PYTHONSAFEPATH"] = "1"
        restarts = config.launcher.max_restarts
        numbers = [str(os.getpid()), str(restarts)]
        command = [sys.executable, "-m", "fsdp_qlora.cli.agent", str(num_ranks), verb, *numbers]
        agent = subprocess.Popen(command, env=environment, start_new_session=True)
        _wait(agent, Path(f"{exit_file}.{restarts}"))
        return _verdict(verb, exit_file, agent.returncode, config)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Make a folder for what the ranks and their launcher tell each other.

    Raises:
        StorageError: if there is no place for one.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="fsdp_qlora-", ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(
            f"TMPDIR: no folder for temporary files can be written ({error.strerror}); set TMPDIR to one that can."
        ) from error
    with folder as name:
        yield Path(name)


def _wait(agent: subprocess.Popen[bytes], last_exit_file: Path) -> None:
    """Wait for the agent; pass the first signal on, kill all at the second, or when a failed run does not end."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            print(
                f"\n{signal.Signals(number).name}: saving, then leaving; once more to leave at once.", file=sys.stderr
            )
            agent.send_signal(number)
        else:
            agent.kill()  # its ranks die with it

    before = take_signals(_SIGNALS, forward)
    try:
        failed_at = None
        while agent.poll() is None:
            time.sleep(0.05)
            told = read_exit(last_exit_file) if failed_at is None and last_exit_file.exists() else None
            if told is not None and told["code"] not in (0, STOPPED_EXIT_CODE):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _LEAVE_SECONDS:
                agent.kill()  # a rank that stands still hears no SIGTERM; it dies with the agent
    finally:
        give_back_signals(before)


def _verdict(verb: str, exit_file: Path, agent_code: int, config: RunConfig) -> int:
    attempts = range(config.launcher.max_restarts, -1, -1)
    told = next((t for n in attempts if (t := read_exit(Path(f"{exit_file}.{n}"))) is not None), None)
    agent = read_exit(exit_file.with_name("agent.json"))
    said_why = told is not None and (told["expected"] or told["code"] == STOPPED_EXIT_CODE)
    if agent and agent["code"] < 0 and agent["code"] != -signal.SIGTERM and not said_why:
        name = signal.Signals(-agent["code"]).name
        why = " Out of memory? See the kernel's log (dmesg)." if name == "SIGKILL" else ""
        told = {"code": 1, "rank": agent["rank"], "message": f"rank {agent['rank']} was ended by {name}.{why}"}
        if verb == "train":
            RunFolder(config.run.output_root, config.run.name).write_exit(1, agent["rank"], told["message"])
    if told is None or (told["code"] == 0 and agent_code > 0):
        print(f"fsdp-qlora: the ranks ended without a word (launcher code {agent_code}).", file=sys.stderr)
        return agent_code if agent_code > 0 else 1
    if told["message"]:
        print(f"fsdp-qlora, rank {told['rank']}: {visible(told['message'])}", file=sys.stderr, flush=True)
    return told["code"]
