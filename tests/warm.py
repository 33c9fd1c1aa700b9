"""The command line and its ranks without their 10 s of imports: forked from a server that has imported, and opened nothing.

Each is a real process that runs `fsdp_qlora.__main__.main` as torchrun would start it; only the imports are shared.
A rank can be told to get a signal at its n-th write below a folder: an audit hook sees every open for writing, rename,
mkdir and remove of the interpreter, so no write point has to be known by the test.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PRELOAD = ["tests.warm_imports"]
_NUMBERS = itertools.count()
_WRITES = ("os.rename", "os.mkdir", "os.remove", "os.link", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Fault:
    """What happens to one rank."""

    rank: int
    folder: str
    """Writes below this folder are counted."""
    at: int = 0
    """Get ``number`` just before this write, from 1; 0 = never."""
    number: int = signal.SIGKILL
    """The signal."""
    hold: str | None = None
    """The thread that makes the first write which matches this never comes back from it."""
    log: str | None = None
    """File that takes one line a write."""
    file_limit: int | None = None
    """RLIMIT_FSIZE in bytes: longer writes fail."""


@dataclass
class Ranks:
    """Started ranks."""

    processes: list[Any]
    outputs: list[Path]

    def wait(self, timeout: float) -> list[int]:
        """Return the exit codes; kill and fail if they have not ended in time."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if late:
            self.kill()
            raise AssertionError(f"ranks {late} did not end in {timeout} s\n{self.text()}")
        return [process.exitcode for process in self.processes]

    def kill(self, number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, or all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def text(self) -> str:
        """Return what the ranks printed."""
        return "\n".join(f"--- rank {n}\n{file.read_text()}" for n, file in enumerate(self.outputs))


def start(
    arguments: Sequence[str], folder: Path, env: dict[str, str], num_ranks: int = 2, fault: Fault | None = None
) -> Ranks:
    """Start ``fsdp-qlora`` with these arguments on ``num_ranks`` ranks in ``folder``."""
    context = _context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"rank{rank}.txt" for rank in range(num_ranks)]
    for file in outputs:
        file.unlink(missing_ok=True)
    processes = []
    for rank in range(num_ranks):
        environment = {
            **env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        own = fault if fault is not None and fault.rank == rank else None
        process = context.Process(
            target=_rank, args=(list(arguments), str(folder), environment, str(outputs[rank]), own), daemon=True
        )
        process.start()
        processes.append(process)
    return Ranks(processes, outputs)


def run(
    arguments: Sequence[str], folder: Path, env: dict[str, str], num_ranks: int = 2, fault: Fault | None = None,
    timeout: float = 90,
) -> tuple[list[int], str]:  # fmt: skip
    """Start, wait, and return the exit codes and what was printed."""
    ranks = start(arguments, folder, env, num_ranks, fault)
    return ranks.wait(timeout), ranks.text()


def command(
    arguments: Sequence[str], folder: Path, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run ``fsdp-qlora`` in one process that is no rank, as `subprocess.run` would."""
    streams = [folder / f".{name}.{next(_NUMBERS)}" for name in ("stdout", "stderr")]
    process = _context().Process(target=_main, args=(list(arguments), str(folder), env, *map(str, streams)))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired(list(arguments), timeout, *(file.read_bytes() for file in streams))
    out, err = (file.read_text() for file in streams)
    for file in streams:
        file.unlink()
    return subprocess.CompletedProcess(list(arguments), process.exitcode or 0, out, err)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _rank(arguments: list[str], folder: str, env: dict[str, str], output: str, fault: Fault | None) -> None:
    _main(arguments, folder, env, output, output, fault)


def _main(
    arguments: list[str], folder: str, env: dict[str, str], out: str, err: str, fault: Fault | None = None
) -> None:  # fmt: skip
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if fault is not None:
        _install(fault)
    from fsdp_qlora.__main__ import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def _install(fault: Fault) -> None:
    if fault.file_limit is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_limit, fault.file_limit))
        return
    log = Path(fault.log).open("w", buffering=1) if fault.log else None  # noqa: SIM115 (for as long as the process)
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            writes = isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        else:
            writes = event in _WRITES
        paths = [str(a) for a in args[:2] if isinstance(a, (str, os.PathLike))]
        if not writes or not any(path.startswith(fault.folder) for path in paths):
            return
        count += 1
        if fault.hold is not None and re.search(fault.hold, f"{event} {' '.join(paths)}"):
            threading.Event().wait()
        if log is not None:
            log.write(f"{count} {event} {' '.join(paths)}\n")
        if count == fault.at:
            os.kill(os.getpid(), fault.number)

    sys.addaudithook(hook)
