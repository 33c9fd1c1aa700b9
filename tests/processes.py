"""Launches of the command line from outside: start, wait for a step, find the ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def start(arguments: list[str], env: dict[str, str], folder: Path, **extra: str) -> subprocess.Popen[str]:
    """Start the command line in ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", "fsdp_qlora", *arguments], cwd=folder, env={**env, **extra}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_step(file: Path, step: int, process: subprocess.Popen[Any], timeout: float = 240) -> None:
    """Wait until metrics.jsonl has a line of ``step``."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and f'"step": {step}' in file.read_text():
            return
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    raise AssertionError(f"step {step} did not come\n{out}\n{err}")


def ranks_of(process: subprocess.Popen[Any]) -> list[int]:
    """Return the processes of this launch that are ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
                parent_chain = _ancestors(int(entry.name))
            except OSError:
                continue
            if any(w.startswith(b"LOCAL_RANK=") for w in words) and process.pid in parent_chain:
                found.append(int(entry.name))
    return found


def _ancestors(pid: int) -> list[int]:
    chain = []
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
        chain.append(pid)
    return chain


def rank_pid(process: subprocess.Popen[Any], local_rank: int) -> int:
    """Return the process of one rank."""
    word = f"LOCAL_RANK={local_rank}".encode()
    return next(p for p in ranks_of(process) if word in Path(f"/proc/{p}/environ").read_bytes().split(b"\0"))


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
