"""The tests of tests/gpu as rows of the table: how many passed, failed and were skipped, also if time ended them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

from benchmarks.ranks import ROOT, TIME_IS_UP

_VERDICT = re.compile(r"^(?P<test>\S+::\S.*?) (?P<verdict>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
SMALL = ("-k", "backend_has_a_name or test_int8_is_linear8bitlt")
"""Of a dry run: two quick kinds of tests."""


def run_suite(cpu: bool, arguments: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Run tests/gpu/run.sh, at most so many seconds; return its counts and the names of what failed."""
    env = {**os.environ, "DEVICE": "cpu" if cpu else "cuda", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tests" / "gpu" / "run.sh"), "-v", "--tb=line", "--color=no", *arguments]
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(0.0, seconds), end)
    timer.start()
    assert process.stdout is not None
    lines = list(process.stdout)
    code = process.wait()
    timer.cancel()
    counts, failed = count(lines)
    row: dict[str, Any] = {"counts": counts, "failed_tests": failed, "seconds": time.monotonic() - started}
    if late.is_set():
        row["failed"] = TIME_IS_UP
    elif not counts:
        row["failed"] = f"exit code {code}: {lines[-1].strip() if lines else 'no word'}"
    return row


def count(lines: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return how often pytest -v says each verdict, and the tests that failed."""
    verdicts = [match for line in lines if (match := _VERDICT.match(line))]
    counts = Counter(match["verdict"].lower() for match in verdicts)
    return dict(counts), [match["test"] for match in verdicts if match["verdict"] in ("FAILED", "ERROR")]
