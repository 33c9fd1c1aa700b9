"""What a start from the base weights takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fsdp_qlora.adapters.starts import workspace
from fsdp_qlora.shapes.linears import LinearShape

_MEASURE = """
import resource, sys
import torch
from fsdp_qlora.adapters.starts import begin
from fsdp_qlora.quant.formats import build_format

torch.set_num_threads(1)
name, rows, columns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
begin(name, torch.randn(64, 64), 4, 2.0, 0, build_format(), 2)  # libraries
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
begin(name, torch.randn(rows, columns), 16, 2.0, 0, build_format(), 2)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024 - before)  # not ru_maxrss, which a child has from the process that started it
"""


@pytest.mark.full
@pytest.mark.parametrize("shape", [(3000, 2000), (2000, 3000), (4000, 1000)], ids=str)
@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_the_planned_workspace_is_the_measured_one(name, shape):
    command = [sys.executable, "-c", _MEASURE, name, *map(str, shape)]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    planned = workspace(name, LinearShape("any", *shape), 16)
    assert 0.6 * planned <= measured <= 1.1 * planned + 2**22
