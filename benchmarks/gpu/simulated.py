"""The peak of a spec's step by simulation, as `fsdp-qlora plan plan.simulate=true` finds it.

`python -m benchmarks.gpu.simulated SPEC LENGTH RANKS` prints it as JSON: a process of its own, because a simulation
opens a process group.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.ranks import ROOT, TIME_IS_UP
from benchmarks.step_spec import Spec


def simulated(spec: Spec, length: int, num_ranks: int, seconds: float) -> dict[str, Any]:
    """Return ``simulated`` (bytes) and ``simulated_how``, or only ``simulation_failed`` and why."""
    command = [sys.executable, "-m", "benchmarks.gpu.simulated", json.dumps(asdict(spec)), str(length), str(num_ranks)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"simulation_failed": TIME_IS_UP}
    if done.returncode:
        return {"simulation_failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Simulate what the arguments say."""
    from benchmarks.step_ours import config_of
    from fsdp_qlora.cli.quiet import quieten
    from fsdp_qlora.simulate.step import simulate

    quieten()
    spec, length, num_ranks = Spec(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    simulation = simulate(config_of(spec, length, num_ranks), num_ranks)
    print(json.dumps({"simulated": simulation.peak_bytes, "simulated_how": simulation.how}))


if __name__ == "__main__":
    main()
