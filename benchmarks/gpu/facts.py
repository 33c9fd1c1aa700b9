"""What the figures were measured on, found out in a process of its own: a CUDA context would take the ranks' memory.

`python -m benchmarks.gpu.facts` prints it as JSON.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.ranks import ROOT, machine

Facts = dict[str, Any]


def facts() -> Facts:
    """Return device, number of devices, driver, libraries; ``accelerator`` is None on a CPU."""
    command = [sys.executable, "-m", "benchmarks.gpu.facts"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks.gpu.facts failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _look() -> Facts:
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        **machine(),
        "accelerator": None if kind is None else kind.type,
        "cards": 0 if kind is None else torch.accelerator.device_count(),
        "driver": _driver(),
        "runtime": torch.version.cuda or torch.version.hip,
        "kernel": platform.release(),
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's driver as nvidia-smi says it; torch has no public name for it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return said[0] if said else None


if __name__ == "__main__":
    print(json.dumps(_look()))
