"""One rank of `benchmarks.step`: builds its way, takes a first step, then as many as a line of standard input says."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

STARTED = float(os.environ.get("BENCH_STARTED", "0"))


def serve(
    step: Callable[[], None], known: dict[str, Any], lines: Iterable[str], say: Callable[[Any], None], baseline: int
) -> None:
    """Take a first step and answer, then for each line answer how long so many steps took.

    A step that runs out of memory is answered with what was planned, what was allocated, and what holds less.

    Args:
        step: trains one step.
        known: what the way knows about itself.
        lines: each is a number of steps.
        say: called with each answer.
        baseline: bytes of resident memory that do not count as growth.
    """
    import torch

    loading = device_memory()
    forget_peaks()
    try:
        step()
        say({"first_step": time.time() - STARTED, **known, "load_allocated": loading.get("allocated")})
        for line in lines:
            started = time.perf_counter()
            for _ in range(int(line)):
                step()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - started
            say({"seconds": seconds, "growth": resident_peak() - baseline, **device_memory()})
    except torch.OutOfMemoryError as error:
        say(failure(error, known))


def resident_peak() -> int:
    """Return the most bytes of resident memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_memory() -> dict[str, int]:
    """Return the peaks of bytes allocated and reserved on this rank's accelerator; nothing on a CPU."""
    import torch

    if not torch.accelerator.is_available():
        return {}
    return {
        "allocated": torch.accelerator.max_memory_allocated(), "reserved": torch.accelerator.max_memory_reserved()
    }  # fmt: skip


def forget_peaks() -> None:
    """Let the peaks begin anew: those of loading are not those of training."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def failure(error: BaseException, known: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a rank that cannot go on; the whole traceback is in its log."""
    import torch

    traceback.print_exception(error)
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    more = {key: known[key] for key in ("planned", "smaller") if key in known}
    return {
        "failed": text, "out_of_memory": isinstance(error, torch.OutOfMemoryError), **more, **device_memory(),
        "trace": traceback.format_exception(error)[-3:],
    }  # fmt: skip


def main() -> None:
    """Be a rank: the spec is the first argument; every answer is a line of JSON."""
    asked = json.loads(sys.argv[1])
    if asked["way"] == "unsloth":
        import unsloth  # noqa: F401 - it wants to be imported before transformers
    import torch

    from benchmarks.step_rows import Rows
    from benchmarks.step_spec import Spec
    from benchmarks.step_ways import WAYS
    from fsdp_qlora.cli.quiet import quieten
    from fsdp_qlora.distributed.process import Placement

    quieten()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print goes to stderr

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    spec, placement = Spec(**asked), Placement.from_env()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    baseline = resident_peak()
    try:
        with WAYS[spec.way](spec, Rows(Path(spec.rows)), placement) as (step, known):
            serve(step, known, sys.stdin, say, baseline)
            if spec.way in ("trl", "unsloth"):
                os._exit(0)  # its loop waits in a thread for a next step
    except (Exception, SystemExit) as error:
        say(failure(error, {}))
        os._exit(1)  # other ranks may be in a collective that this one will not join


if __name__ == "__main__":
    main()
