"""One rank of `benchmarks.step`: builds its way, takes a first step, then as many as a line of standard input says."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

STARTED = float(os.environ["BENCH_STARTED"])


def main() -> None:
    """Be a rank: the spec is the first argument; every answer is a line of JSON."""
    import torch

    from benchmarks.step_rows import Rows
    from benchmarks.step_ways import WAYS, Spec
    from fsdp_qlora.cli.quiet import quieten
    from fsdp_qlora.distributed.process import Placement

    quieten()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print goes to stderr
    spec, placement = Spec(**json.loads(sys.argv[1])), Placement.from_env()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with WAYS[spec.way](spec, Rows(Path(spec.rows)), placement) as (step, known):
        step()
        first = {"first_step": time.time() - STARTED, **known}
        print(json.dumps(first), file=answers, flush=True)
        for line in sys.stdin:
            started = time.perf_counter()
            for _ in range(int(line)):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found = {"seconds": seconds, "growth": peak - baseline}
            if torch.cuda.is_available():
                found["device_peak"] = torch.cuda.max_memory_allocated()
            print(json.dumps(found), file=answers, flush=True)
        if spec.way == "trl":
            os._exit(0)  # its loop waits in a thread for a next step


if __name__ == "__main__":
    main()
