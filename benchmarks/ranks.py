"""The ranks of one way to train, as processes that wait for the word to step: started once, measured by turns."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.step_spec import Spec

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("way", "model", "rows")
TIME_IS_UP = "stopped: the part's time was up"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


class WayFailed(SystemExit):
    """A rank could not go on, or time ended; ``answer`` is what it said, with ``failed`` for people."""

    def __init__(self, way: str, rank: int, answer: dict[str, Any]) -> None:
        super().__init__(f"rank {rank} of {way}: {answer['failed']}")
        self.answer = answer


class Way:
    """A spec's ranks, up and through their first step."""

    def __init__(
        self,
        spec: Spec,
        num_ranks: int,
        logs: Path,
        deadline: float = math.inf,
        code: Path | None = None,
        packages: Path | None = None,
    ) -> None:
        """Start the ranks.

        Args:
            spec: what each rank runs.
            num_ranks: how many there are.
            logs: folder for what they print.
            deadline: time (`time.monotonic`) at which they are ended, whatever they do.
            code: checkout that they run; None = this one.
            packages: folder of further packages for these ranks alone.

        Raises:
            WayFailed: if a rank cannot build its way or take the first step, or not in time.
        """
        self.spec, self.num_ranks, self._deadline = spec, num_ranks, deadline
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as our launcher sets it, for all ways
            "BENCH_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.step_rank", json.dumps(_said(spec))]
        self._processes = []
        for rank in range(num_ranks):
            env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if code is not None:
                env["PYTHONPATH"] = str(code.resolve())
            if packages is not None:
                env["PYTHONPATH"] = os.pathsep.join([str(packages.resolve()), env.get("PYTHONPATH", "")])
            with (logs / f"{spec.way}-{rank}.txt").open("w") as log:
                pipes: dict[str, Any] = {
                    "stdin": subprocess.PIPE,
                    "stdout": subprocess.PIPE,
                    "stderr": log,
                    "text": True,
                    "cwd": code or ROOT,
                }
                self._processes.append(subprocess.Popen(command, env=env, **pipes))
        self.first = self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        """Return a line of each rank, in their order; the first to fail ends all."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                waiting.register(process.stdout, selectors.EVENT_READ, (rank, process.stdout))
            while len(answers) < self.num_ranks:
                left = None if math.isinf(self._deadline) else max(0.0, self._deadline - time.monotonic())
                ready = waiting.select(left)
                if not ready:
                    self._fail(min(set(range(self.num_ranks)) - answers.keys()), {"failed": TIME_IS_UP})
                for key, _ in ready:  # each rank says one whole line at a time
                    rank, stream = key.data
                    waiting.unregister(stream)
                    line = stream.readline()
                    answers[rank] = json.loads(line) if line else {"failed": "it ended without a word; see its log"}
                    if "failed" in answers[rank]:
                        self._fail(rank, answers[rank])
        return [answers[rank] for rank in range(self.num_ranks)]

    def _fail(self, rank: int, answer: dict[str, Any]) -> NoReturn:
        for process in self._processes:
            process.kill()
        self.close()
        raise WayFailed(self.spec.way, rank, answer)

    def steps(self, count: int) -> list[dict[str, Any]]:
        """Train ``count`` steps; return what each rank measured.

        Raises:
            WayFailed: if a rank cannot, or not in time.
        """
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return self._answers()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _said(spec: Spec) -> dict[str, Any]:
    """Return the spec without what is at its default: an older checkout may not know it."""
    plain = asdict(Spec(spec.way, spec.model, spec.rows))
    return {key: value for key, value in asdict(spec).items() if key in NEEDED or value != plain[key]}


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
