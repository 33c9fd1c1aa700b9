"""The ranks of one way to train, as processes that wait for the word to step: started once, measured by turns."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.step_ways import Spec

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


class Way:
    """A spec's ranks, up and through their first step; they run the checkout ``code`` instead of this one if given."""

    def __init__(self, spec: Spec, num_ranks: int, logs: Path, code: Path | None = None) -> None:
        self.spec, self.num_ranks = spec, num_ranks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as our launcher sets it, for all ways
            "BENCH_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.step_rank", json.dumps(asdict(spec))]
        self._processes = []
        for rank in range(num_ranks):
            env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if code is not None:
                env["PYTHONPATH"] = str(code.resolve())
            with (logs / f"{spec.way}-{rank}.txt").open("w") as log:
                pipes: dict[str, Any] = {
                    "stdin": subprocess.PIPE,
                    "stdout": subprocess.PIPE,
                    "stderr": log,
                    "text": True,
                }
                self._processes.append(subprocess.Popen(command, env=env, cwd=code, **pipes))
        self.first = self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                self.close()
                raise SystemExit(f"rank {rank} of {self.spec.way} ended; see its log")
            found.append(json.loads(line))
        return found

    def steps(self, count: int) -> list[dict[str, Any]]:
        """Train ``count`` steps; return what each rank measured."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return self._answers()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": name, "cores": os.cpu_count(), "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "versions": {n: version(n) for n in LIBRARIES if find_spec(n) is not None},
    }  # fmt: skip


def _processor() -> str:
    wanted = {"model name", "cpu family", "model"}
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    found = {key.strip(): value.strip() for key, value in lines if key.strip() in wanted}
    return f"{found.get('model name', '?')} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"
