"""Runs a simulation in a process of its own, which reads settings from stdin and writes what it finds to stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fsdp_qlora import errors
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.simulate.result import Simulation

_ROOT = Path(__file__).resolve().parents[2]


def simulate_apart(config: RunConfig, world_size: int) -> Simulation:
    """Run `fsdp_qlora.simulate.step.simulate_here` in a new process, and wait for it.

    The new process imports torch and transformers anew, which takes some 10 s; it dies with this one.

    Raises:
        FsdpQloraError: the error that the simulation raised, of the same kind and with the same message.
        RuntimeError: if the process failed otherwise; its traceback is on stderr.
    """
    asked = json.dumps({"config": to_dict(config), "world_size": world_size})
    # Device backends that load themselves with torch could register the one device type that Python may register.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": _search_path()}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fsdp_qlora.simulate", str(os.getpid())],
        input=asked, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"plan.simulate: the process that simulates ended with code {done.returncode}.")
    answer = json.loads(done.stdout)
    if (failed := answer.get("error")) is not None:
        raise getattr(errors, failed["kind"])(failed["message"])
    return Simulation.from_values(answer)


def _search_path() -> str:
    """Return PYTHONPATH for the new process: this package first, then what this process was given."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
